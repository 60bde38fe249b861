"""Gradients of single examples of a linear leaf, with the squared norm of each tile beside it.

One program per example and tile of its gradient: it sums over the tokens in registers, rounds,
stores, and squares what it has stored, so that the gradients are not read again for their norms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.ops.kernels.aot_case import AotCase

# tokens at once
BLOCK_T = 32
WARPS = 4


@triton.jit
def sample_grads_kernel(
    x,  # (N, T, I)
    g,  # (N, T, O)
    grads,  # (N, O, I)
    squares,  # (N, tiles of O, tiles of I) float32
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    x += n * T * I
    g += n * T * O
    grads += n * O * I
    rows = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        # [BO, BT] and [BT, BI]
        left = tl.load(
            g + tokens[None, :] * O + rows[:, None],
            mask=(tokens[None, :] < T) & (rows[:, None] < O),
            other=0.0,
        )
        right = tl.load(
            x + tokens[:, None] * I + cols[None, :],
            mask=(tokens[:, None] < T) & (cols[None, :] < I),
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    stored = total.to(grads.dtype.element_ty)
    inside = (rows[:, None] < O) & (cols[None, :] < I)
    tl.store(grads + rows[:, None].to(tl.int64) * I + cols[None, :], stored, mask=inside)
    # what is outside is a product of zeros
    wide = stored.to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, 1), 0)
    tile = (n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + tile, square)


def blocks(out: int, inp: int) -> tuple[int, int]:
    """Tile of a gradient (out, inp), longer along its longer side."""
    short = min(64, max(16, triton.next_power_of_2(min(out, inp))))
    # larger tiles of float32 products do not fit in an A100's registers
    long = min(128 if short == 16 else 64, max(16, triton.next_power_of_2(max(out, inp))))
    return (short, long) if out <= inp else (long, short)


def sample_grads(x: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradients (N, O, I) in `dtype`, squared norms (N,)) of x (N, T, I) and g (N, T, O)."""
    count, tokens, inp = x.shape
    out = g.shape[2]
    block_o, block_i = blocks(out, inp)
    grid = (triton.cdiv(inp, block_i), triton.cdiv(out, block_o), count)
    grads = torch.empty(count, out, inp, dtype=dtype, device=x.device)
    squares = torch.empty(count, grid[1], grid[0], dtype=torch.float32, device=x.device)
    sample_grads_kernel[grid](
        x.contiguous(),
        g.contiguous(),
        grads,
        squares,
        tokens,
        out,
        inp,
        # the interpreter multiplies the bit patterns of bfloat16
        WIDEN=x.dtype != g.dtype or x.device.type == "cpu",
        BLOCK_T=BLOCK_T,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=WARPS,
    )
    return grads, squares.sum((1, 2))


def _case(x: str, g: str, grads: str, out: int, inp: int) -> AotCase:
    block_o, block_i = blocks(out, inp)
    return AotCase(
        sample_grads_kernel,
        {
            **{"x": f"*{x}", "g": f"*{g}", "grads": f"*{grads}", "squares": "*fp32"},
            **{"T": "i32", "O": "i32", "I": "i32"},
        },
        {"WIDEN": x != g, "BLOCK_T": BLOCK_T, "BLOCK_O": block_o, "BLOCK_I": block_i},
        WARPS,
    )


AOT = (
    _case("fp32", "bf16", "fp32", 8, 2048),
    *(
        _case(kind, kind, kind, *shape)
        for shape in ((8, 2048), (2048, 16), (32, 4096), (4096, 64))
        for kind in ("bf16", "fp32")
    ),
)
