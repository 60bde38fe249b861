"""Coding of updates and the sum of coded ones, beside a copy of as many bytes.

    python -m benchmarks.kernels.codec [--device cuda]

Prints one JSON object: on a GPU the share of a copy's bandwidth that each reaches, of which 0.7
is demanded; everywhere the bytes that coding moves for an entry, every operand once.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.counting import Count, Counting, size, tensors
from benchmarks.kernels.timing import milliseconds
from fedlora.ops.delta_codec import BLOCK, decode_sum, encode

LEVELS, CLIENTS = 127, 16


def counted(entries: int, *, random: bool) -> Count:
    """Of coding once, with feedback; on tensors without data."""
    delta, owed = (torch.empty(entries, device="meta") for _ in range(2))
    key = torch.empty((), dtype=torch.int64, device="meta") if random else None
    with Counting() as mode:
        encode(delta, LEVELS, owed, key)
    return mode.count


def figures(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, list[float]]:
    """Bytes for an entry, and on a GPU shares of a copy's bandwidth, of 16 clients' updates."""
    # of 1B with rank 16 on every linear layer
    entries = 1000 * BLOCK if tiny else 176_000 * BLOCK
    found = {"codec bytes": [counted(entries, random=True).moved / entries]}
    draws = torch.Generator(device).manual_seed(0)
    delta, owed = (torch.randn(entries, generator=draws, device=device) for _ in range(2))
    key = torch.tensor(7, dtype=torch.int64, device=device)
    codes, scales, _ = encode(delta, LEVELS, owed, key)
    held = codes.repeat(CLIENTS, 1), scales.repeat(CLIENTS, 1)
    weights = torch.rand(CLIENTS, generator=draws, device=device)
    target = torch.empty_like(held[0])
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "codec encode": _way(lambda: encode(delta, LEVELS, owed), delta, owed),
        "codec encode at random": _way(lambda: encode(delta, LEVELS, owed, key), delta, owed),
        "codec sum": _way(lambda: (decode_sum(*held, weights),), *held),
    }
    copied = 2 * size(held[0])
    for _ in range(repeats if device == "cuda" else 0):
        copy = copied / milliseconds(lambda: target.copy_(held[0]), device)
        for name, (run, moved) in ways.items():
            found.setdefault(name, []).append(moved / milliseconds(run, device) / copy)
    return found


def _way(run: Callable[[], tuple[Tensor, ...]], *read: Tensor) -> tuple[Callable[[], object], int]:
    """What is run, and the bytes that it reads and writes."""
    return run, sum(map(size, (*read, *tensors(run()))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
