"""Leaf modules that adapters are built of.

Every trained parameter sits in a leaf without buffers and without children, so that hooks
on the leaf see exactly its input and output gradient. Dimension 0 of the last positional
argument is the batch.
"""

import torch
import torch.nn.functional as F
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
    out, inp = weight.shape
    linear = nn.Linear(inp, out, bias=False, device="meta")
    linear.weight = _trainable(weight)
    return linear


def leaf_weight(leaf: nn.Module) -> nn.Parameter:
    """The trained parameter of a leaf."""
    assert isinstance(leaf.weight, nn.Parameter)
    return leaf.weight


def is_tapped(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class DiagScale(nn.Module):
    """y = x * v for a trained vector v (f,)."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.weight = _trainable(vector)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class BlockDiagLinear(nn.Module):
    """z_j = B_j x_j for trained blocks B (n, b, b); x and z are (..., n b)."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.weight = _trainable(blocks)

    def forward(self, x: Tensor) -> Tensor:
        n, b, _ = self.weight.shape
        z = torch.einsum("...ji,joi->...jo", x.reshape(*x.shape[:-1], n, b), self.weight)
        return z.flatten(-2)


class BoneColDelta(nn.Module):
    """y = x D^T with D_ij = W_ij B_i + B_i for trained blocks B (n, b, b), n = ceil(d / b)."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.weight = _trainable(blocks)

    # x comes last: Opacus reads the batch size off the last argument
    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, bone_col_delta(weight, self.weight).to(x.dtype))


def bone_col_delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """W_ij B_i + B_i for every block, (d, k), in the dtype of `blocks`.

    Args:
        weight: W0 (d, k); zero-padded to whole blocks inside.
        blocks: B (ceil(d / b), b, b).
    """
    d, k = weight.shape
    b = blocks.shape[-1]
    # in bf16, W B + B would lose a small B
    with torch.autocast(weight.device.type, enabled=False):
        w = padded_blocks(weight.to(blocks.dtype), b)  # (n, b, m, b)
        n, _, m, _ = w.shape
        product = w.reshape(n, b * m, b) @ blocks
        delta = product.view(n, b, m, b) + blocks.unsqueeze(2)
    return delta.reshape(n * b, m * b)[:d, :k]


def padded_blocks(weight: Tensor, b: int) -> Tensor:
    """`weight` (d, k), zero-padded to multiples of b, as (d / b, b, k / b, b)."""
    d, k = weight.shape
    padded = F.pad(weight, (0, -k % b, 0, -d % b))
    return padded.reshape(padded.shape[0] // b, b, padded.shape[1] // b, b)


def pad_last(x: Tensor, multiple: int) -> Tensor:
    """`x` with its last dimension zero-padded to a multiple."""
    return F.pad(x, (0, -x.shape[-1] % multiple))


def _trainable(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=True)
