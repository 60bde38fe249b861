"""The order in which a client sees its examples."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader

from fedlora.data.example import Batch, Example, collate

# batches whose examples are sorted among one another by length_bucketed
WINDOW = 32


def batch_order(
    num_examples: int,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
    lengths: Sequence[int] | None = None,
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
        lengths: of every example; batches are then made of examples of like length, which
            need less padding. Every permutation still has every example once, and a batch that
            two of them share is not sorted.
    """
    assert num_examples >= 1, "a client without examples cannot train"
    assert batch_size >= 1, f"batch_size is {batch_size}, expected at least 1"
    size = min(batch_size, num_examples)
    waiting: list[int] = []
    batches: list[list[int]] = []
    for _ in range(num_batches):
        while len(waiting) < size:
            drawn = torch.randperm(num_examples, generator=generator).tolist()
            if lengths is not None:
                shared = min(len(drawn), -len(waiting) % size)
                rest = _bucketed(drawn[shared:], lengths, size, generator)
                drawn = drawn[:shared] + rest
            waiting += drawn
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches


def _bucketed(
    drawn: list[int], lengths: Sequence[int], size: int, generator: torch.Generator
) -> list[int]:
    """The same numbers: batches of like lengths in random order, then what fills no batch."""
    batches: list[list[int]] = []
    left: list[int] = []
    for start in range(0, len(drawn), WINDOW * size):
        window = drawn[start : start + WINDOW * size]
        whole = len(window) - len(window) % size
        # what is left over is random: the longest would come last in every epoch
        alike = sorted(window[:whole], key=lengths.__getitem__)
        batches += [alike[i : i + size] for i in range(0, whole, size)]
        left += window[whole:]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [number for place in order for number in batches[place]] + left


def example_lengths(examples: Sequence[Example]) -> list[int] | None:
    """Tokens of every example; None for pictures, which are all alike."""
    if "input_ids" not in examples[0].inputs:
        return None
    return [len(example.inputs["input_ids"]) for example in examples]


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
    if not num_workers:
        return (collate([examples[i] for i in numbers], pad_id) for numbers in order)
    batches: DataLoader[Batch] = DataLoader(
        examples,  # type: ignore[arg-type]  # any sequence is a map-style data set
        batch_sampler=[list(numbers) for numbers in order],
        collate_fn=partial(collate, pad_id=pad_id),
        num_workers=num_workers,
        # the workers' base seed would be drawn from torch's global stream
        generator=torch.Generator(),
    )
    return iter(batches)
