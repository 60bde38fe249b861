"""Names sorted as a reader counts: client-2 before client-10."""

import re

Key = tuple[tuple[int, str], ...]


def natural_key(name: str) -> Key:
    """Sort key in which runs of digits count as numbers."""
    pieces = re.split(r"([0-9]+)", name)
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in pieces if p)
