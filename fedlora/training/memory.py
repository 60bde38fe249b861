"""Running out of memory, told apart from other errors."""

import torch


def out_of_memory(error: RuntimeError) -> bool:
    """The machine had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
