"""Running out of memory, told apart from other errors, and what helps against it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Done = TypeVar("Done")


def out_of_memory(error: RuntimeError) -> bool:
    """The machine had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def in_halves(items: Sequence[Item], work: Callable[[Sequence[Item]], Done]) -> Iterator[Done]:
    """Does some work on all items, halving what does not fit into memory.

    Args:
        items: at least one.
        work: must change nothing when memory runs out.

    Yields:
        what `work` made of each part.

    Raises:
        RuntimeError: memory is not enough for one item, or any other failure of `work`.
    """
    todo = [items]
    while todo:
        part = todo.pop(0)
        try:
            done = work(part)
        except RuntimeError as e:
            if len(part) == 1 or not out_of_memory(e):
                raise
            half = len(part) // 2
            todo[:0] = [part[:half], part[half:]]
            continue
        yield done


class Shares:
    """Divides clients into groups that fit into memory together.

    Attributes:
        width: most clients of a group; halved when memory runs out, for good.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def each(self, clients: int, work: Callable[[slice], Done]) -> Iterator[tuple[slice, Done]]:
        """Does the work of the first so many clients, group after group.

        Args:
            work: given the clients of a group; must change nothing when memory runs out.

        Yields:
            the clients of a group and what `work` made of them.

        Raises:
            RuntimeError: memory is not enough for one client, or any other failure of `work`.
        """
        begin = 0
        while begin < clients:
            rows = slice(begin, min(clients, begin + self.width))
            size = rows.stop - begin
            try:
                done = work(rows)
            except RuntimeError as e:
                if size == 1 or not out_of_memory(e):
                    raise
                self.width = size // 2
                continue
            yield rows, done
            begin = rows.stop
