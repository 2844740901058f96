"""Keep TRL from logging a hint about its loss type `luspo` that does not apply here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _LuspoHint(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "When using `'luspo'` loss" not in record.getMessage()


@contextmanager
def no_luspo_hint() -> Iterator[None]:
    """Filter out TRL's advice to combine `luspo` with ratios of sequences.

    That is right for LUSPO. AGRPO and TraceRL take `luspo` with ratios of tokens, for its sum over a view's tokens.
    """
    logger, hint = logging.getLogger("trl.trainer.grpo_trainer"), _LuspoHint()
    logger.addFilter(hint)
    try:
        yield
    finally:
        logger.removeFilter(hint)
