"""The number format in which a linear op computes."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of an op on `x`: autocast's format, if it is on and takes `x`; else that of `x`."""
    kind = x.device.type
    # a meta tensor's device knows nothing of autocast
    eligible = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    if eligible and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
