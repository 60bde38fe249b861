"""The order in which a client sees its examples."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader

from fedlora.data.example import Batch, Example, collate


def batch_order(
    num_examples: int, batch_size: int, num_batches: int, generator: torch.Generator
) -> list[list[int]]:
    """Example numbers of each batch: sampling without replacement, permutation after permutation.

    The next permutation starts where the current one is used up, within a batch if need be. With
    fewer examples than `batch_size` a batch is all examples once. The generator alone decides;
    fewer batches are the beginning of more batches.

    Args:
        num_examples: at least 1.
        batch_size: at least 1.
        num_batches: 0 or more.
        generator: a CPU generator; it is advanced.
    """
    assert num_examples >= 1, "a client without examples cannot train"
    assert batch_size >= 1, f"batch_size is {batch_size}, expected at least 1"
    size = min(batch_size, num_examples)
    waiting: list[int] = []
    batches: list[list[int]] = []
    for _ in range(num_batches):
        while len(waiting) < size:
            waiting += torch.randperm(num_examples, generator=generator).tolist()
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches


def loader(
    examples: Sequence[Example],
    order: Sequence[Sequence[int]],
    pad_id: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The batches of `order`, one after the other, the same for every number of workers.

    Args:
        examples: what the numbers in `order` point into.
        order: example numbers of each batch, as from `batch_order`.
        pad_id: token that fills up short texts.
        num_workers: processes that stack batches ahead; 0 stacks them in this one.
    """
    batches: DataLoader[Batch] = DataLoader(
        examples,  # type: ignore[arg-type]  # any sequence is a map-style data set
        batch_sampler=[list(numbers) for numbers in order],
        collate_fn=partial(collate, pad_id=pad_id),
        num_workers=num_workers,
        # the workers' base seed would be drawn from torch's global stream
        generator=torch.Generator(),
    )
    return iter(batches)
