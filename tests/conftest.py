"""What all tests share."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Keep the imported modules out of every later garbage collection: trainers collect, and pass half a million."""
    gc.collect()
    gc.freeze()
