"""The number format in which a linear op computes."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of an op on `x`: autocast's format, if it is on and takes `x`; else that of `x`."""
    kind = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64
    if eligible and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
