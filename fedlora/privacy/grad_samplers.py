"""Per-sample gradients, and their norms, of our own leaf modules, for taps and for Opacus.

Opacus calls a sampler with the leaf, its positional inputs and the gradient of its output,
all with the batch in dimension 0; see its "Supporting new layers" guide,
https://github.com/pytorch/opacus/tree/main/opacus/grad_sample. Without a sampler it would
differentiate the module sample by sample.

Shapes: N samples, T tokens, b block size, n blocks. Plain linear leaves need nothing here:
Opacus knows nn.Linear.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapters.leaves import (
    BlockDiagLinear,
    BoneColDelta,
    DiagScale,
    pad_last,
    padded_blocks,
)
from fedlora.adapters.stacked_leaves import StackedBlocks, StackedScale

Samples = dict[Tensor, Tensor]
# (leaf, inputs, gradient of its output) -> gradients, or norms, by example
Sampler = Callable[[Any, Sequence[Tensor], Tensor], Samples]


def register_grad_samplers() -> None:
    """Makes the samplers known to Opacus; calling it again changes nothing."""
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler

    for kind, sampler in SAMPLERS.items():
        register_grad_sampler(kind)(_if_trained(sampler))
    for kind, sampler in NORM_SAMPLERS.items():
        register_norm_sampler(kind)(_if_trained(sampler))


def diag_scale_grads(
    leaf: DiagScale | StackedScale, inputs: Sequence[Tensor], backprops: Tensor
) -> Samples:
    """sum_t x_t * g_t, (N, f)."""
    x = inputs[0].to(backprops.dtype)
    return {leaf.weight: _tokens(x * backprops).sum(1)}


def diag_scale_norms(
    leaf: DiagScale | StackedScale, inputs: Sequence[Tensor], backprops: Tensor
) -> Samples:
    """Norms (N,) of `diag_scale_grads`."""
    return _norms(diag_scale_grads(leaf, inputs, backprops))


def block_diag_grads(
    leaf: BlockDiagLinear | StackedBlocks, inputs: Sequence[Tensor], backprops: Tensor
) -> Samples:
    """sum_t u_tj x_tj^T for every block j, (N, n, b, b)."""
    x, u = _strips(leaf, inputs[0].to(backprops.dtype)), _strips(leaf, backprops)
    return {leaf.weight: torch.einsum("ntjo,ntji->njoi", u, x)}


def block_diag_norms(leaf: BlockDiagLinear, inputs: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Norms (N,) of `block_diag_grads`, by |sum_t u_t x_t^T|^2 = sum_ts (u_t.u_s)(x_t.x_s).

    The Gram form holds T^2 numbers per block instead of b^2.
    """
    x, u = _strips(leaf, inputs[0].to(backprops.dtype)), _strips(leaf, backprops)
    if x.shape[1] > x.shape[3]:
        return _norms(block_diag_grads(leaf, inputs, backprops))
    gram = torch.einsum("ntjo,nsjo->njts", u, u) * torch.einsum("ntji,nsji->njts", x, x)
    return {leaf.weight: gram.sum((1, 2, 3)).clamp_min(0).sqrt()}


def bone_col_grads(leaf: BoneColDelta, inputs: Sequence[Tensor], backprops: Tensor) -> Samples:
    """sum_t [sum_j (W_ij^T g_ti) x_tj^T + g_ti (sum_j x_tj)^T] for output strip i, (N, n, b, b)."""
    weight, x = inputs[0].to(backprops.dtype), inputs[1].to(backprops.dtype)
    b = leaf.weight.shape[-1]
    w = padded_blocks(weight, b)  # (n, b, m, b)
    xs, gs = _strips(leaf, pad_last(x, b)), _strips(leaf, pad_last(backprops, b))
    # one strip at a time: W^T g for all of them would hold N T d k / b numbers
    strips = []
    for i in range(w.shape[0]):
        pulled = torch.einsum("ojc,nto->ntjc", w[i], gs[:, :, i])
        product = torch.einsum("ntjc,ntje->nce", pulled, xs)
        strips.append(product + torch.einsum("nto,nte->noe", gs[:, :, i], xs.sum(2)))
    return {leaf.weight: torch.stack(strips, 1)}


def bone_col_norms(leaf: BoneColDelta, inputs: Sequence[Tensor], backprops: Tensor) -> Samples:
    """Norms (N,) of `bone_col_grads`."""
    return _norms(bone_col_grads(leaf, inputs, backprops))


def _tokens(x: Tensor) -> Tensor:
    """(N, ..., f) -> (N, T, f), also for an empty batch."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _strips(leaf: nn.Module, x: Tensor) -> Tensor:
    """(N, ..., n b) -> (N, T, n, b)."""
    assert isinstance(leaf.weight, Tensor)
    b = leaf.weight.shape[-1]
    x = _tokens(x)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] // b, b)


def _norms(samples: Samples) -> Samples:
    return {p: grads.flatten(1).norm(2, dim=1) for p, grads in samples.items()}


def _if_trained(sampler: Sampler) -> Sampler:
    """`sampler`, which leaves a frozen leaf alone: Opacus asks for those too."""

    def asked(leaf: Any, inputs: Sequence[Tensor], backprops: Tensor) -> Samples:
        return sampler(leaf, inputs, backprops) if leaf.weight.requires_grad else {}

    return asked


SAMPLERS: Mapping[type[nn.Module], Sampler] = {
    DiagScale: diag_scale_grads,
    BlockDiagLinear: block_diag_grads,
    BoneColDelta: bone_col_grads,
}
NORM_SAMPLERS: Mapping[type[nn.Module], Sampler] = {
    DiagScale: diag_scale_norms,
    BlockDiagLinear: block_diag_norms,
    BoneColDelta: bone_col_norms,
}
# an example's gradient is of its own client's values, in the shape that they have alone
STACKED_SAMPLERS: Mapping[type[nn.Module], Sampler] = {
    StackedScale: diag_scale_grads,
    StackedBlocks: block_diag_grads,
}
