"""What all tests share."""

from __future__ import annotations

import gc

import pytest
from transformers.utils import logging


def pytest_collection_finish() -> None:
    """Keep the imported modules out of every later garbage collection: trainers collect, and pass half a million."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _verbosity_of_transformers():
    """Give the next test the log level that this one found: it decides whether a trainer shows its progress."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
