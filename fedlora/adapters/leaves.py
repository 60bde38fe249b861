"""Leaf modules that adapters are built of.

Every trained parameter sits in a leaf without buffers and without children, so that hooks
on the leaf see exactly its input and output gradient.
"""

import torch
from torch import Tensor, nn

from fedlora.seeds import generator


class KeyedDropout(nn.Module):
    """Inverted dropout whose mask depends only on (key, layer), not on call order.

    A recomputed forward pass (gradient checkpointing) therefore draws the same mask. The
    trainer sets a new key for every micro-batch; in eval mode it is the identity.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.key: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        assert self.key is not None, "dropout needs a key; the trainer sets one per micro-batch"
        draws = torch.rand(x.shape, generator=generator(self.key, self.name), dtype=torch.float32)
        keep = (draws >= self.p).to(x.device, x.dtype)
        return x * keep / (1.0 - self.p)


def linear_leaf(weight: Tensor) -> nn.Linear:
    """A trainable bias-free nn.Linear that holds `weight` (out, in), made without random draws."""
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=True)
    return linear
