"""A hint of TRL's that does not fit here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _LuspoHint(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "When using `'luspo'` loss" not in record.getMessage()


@contextmanager
def no_luspo_hint() -> Iterator[None]:
    """TRL advises sequence ratios with "luspo" to whoever wants LUSPO; methods here only share its normalisation."""
    logger, hint = logging.getLogger("trl.trainer.grpo_trainer"), _LuspoHint()
    logger.addFilter(hint)
    try:
        yield
    finally:
        logger.removeFilter(hint)
