"""Where a program's rows are, and which of their entries survive dropout."""

import triton
import triton.language as tl

from fedlora.ops import dropout_mask

ROUNDS = tl.constexpr(dropout_mask.ROUNDS)


@triton.jit
def row_block(table, M, TABLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group, start of the group) of this program's block."""
    block = tl.program_id(0)
    if TABLE:
        group = tl.load(table + 4 * block)
        first = tl.load(table + 4 * block + 1)
        end = tl.load(table + 4 * block + 2)
        start = tl.load(table + 4 * block + 3)
    else:
        group = 0
        first = block * BLOCK_M
        end = M
        start = 0
    return group, first, end, start


@triton.jit
def keep(key, rows, tokens, stream, column, threshold, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """`fedlora.ops.dropout_mask.keep_mask` of columns `column` to `column + BLOCK`, [BM, BLOCK].

    `column` is a multiple of 8, `rows` are numbers within the group, [BM], and `tokens` of them
    are one example.
    """
    groups = (column // 8 + tl.arange(0, BLOCK // 8)).to(tl.int32)
    zero = tl.zeros((BLOCK_M, BLOCK // 8), dtype=tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key,
        zero + groups[None, :],
        zero + (rows % tokens).to(tl.int32)[:, None],
        zero + (rows // tokens).to(tl.int32)[:, None],
        zero + stream,
        n_rounds=ROUNDS,
    )
    # joined dimensions are high bit of the word, low bit of the word, half of it
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    draws = tl.reshape(tl.join(low, high), (BLOCK_M, BLOCK))
    return draws.to(tl.int32) >= threshold
