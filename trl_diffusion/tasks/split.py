"""Decides which problems of the generated tasks are held out."""

import hashlib

HELD_OUT_SHARE = 0.2


def held_out(*problem: object) -> bool:
    """Return whether a problem belongs to the test split.

    A hash of the problem itself decides, so the splits are disjoint for every seed and size.

    Args:
        *problem: what makes two problems the same; its `repr` is hashed.
    """
    digest = hashlib.blake2b(repr(problem).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32
