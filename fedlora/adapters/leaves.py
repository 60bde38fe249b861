"""Leaf modules that adapters are built of.

Every trained parameter sits in a leaf without buffers and without children, so that hooks
on the leaf see exactly its input and output gradient. Dimension 0 of the last positional
argument is the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.errors import TrainingError
from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.row_groups import drawn
from fedlora.seeds import derive_seed


class KeyedDropout(nn.Module):
    """Inverted dropout whose mask depends on a key, and on where in its client's batch an entry is.

    Padding, other clients, the order of calls and a recomputed forward pass (gradient
    checkpointing) change nothing of it. The trainer sets new keys for every micro-batch; in eval
    mode it is the identity.

    Attributes:
        name: of the layer, for errors.
        stream: see `Dropout`; other layers have other masks.
        keys: of every client, int64 (K,).
        room: rows of every client with padding, if there are several.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.stream = derive_seed(0, "dropout", name) % 2**31
        self.keys: Tensor | None = None
        self.room = 0

    def of(self, x: Tensor) -> Dropout | None:
        """What an op drops of its input x (N, ..., k); None for nothing.

        Raises:
            TrainingError: the rows of several clients cannot be told apart.
        """
        if not self.training or self.p == 0.0:
            return None
        assert self.keys is not None, "dropout needs keys; the trainer sets them per micro-batch"
        if len(self.keys) > 1 and len(x) != self.room * len(self.keys):
            raise TrainingError(
                f"layer {self.name} sees {len(x)} rows of a batch of {len(self.keys)} x "
                f'{self.room}, so that dropout cannot tell clients apart; set run.cohort = "off"'
            )
        return Dropout(self.p, self.keys, x.shape[1:-1].numel(), self.stream)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.of(x)
        if dropout is None:
            return x
        sizes = [x.shape[:-1].numel() // len(dropout.key)] * len(dropout.key)
        kept = drawn(dropout, sizes, x).kept
        assert kept is not None
        return torch.where(kept.view(x.shape), x, 0) * dropout.upscale


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
