"""No function forms a d x k matrix."""

import pytest
import torch

from fedlora.linalg import (
    difference,
    fill_dead,
    gram_kernel,
    inner,
    product_norm,
    project,
    recompress,
    stack,
    truncate,
)
from fedlora.strategies.conformance.dense_guard import DenseTensorError, forbid_dense
from tests.linalg.drawn import generator


class TestNoDenseMatrix:
    d = k = 1024

    def stacks(self):
        draws = generator(0)
        return [
            (torch.randn(self.d, 16, generator=draws), torch.randn(16, self.k, generator=draws))
            for _ in range(3)
        ]

    def test_nothing_here_forms_one(self):
        factors = self.stacks()
        rows = torch.randn(8, self.k, generator=generator(1))
        with forbid_dense(self.d * self.k):
            left, right = stack(factors, [0.2, 0.3, 0.5])  # R = 48
            b, a, _ = truncate(left, right, 16)
            truncate(left, right, 64, split="balanced")
            recompress(left, right)
            gram_kernel(factors)
            inner(factors[0], factors[1])
            product_norm(*difference((b, a), factors[0]))
            project(left, right, rows)
            fill_dead(torch.zeros_like(b), torch.zeros_like(a), generator(2))

    def test_the_guard_bites(self):
        left, right = stack(self.stacks(), [1.0, 1.0, 1.0])
        with forbid_dense(self.d * self.k), pytest.raises(DenseTensorError, match="1024, 1024"):
            left @ right
        with forbid_dense(self.d * self.k + 1):
            left @ right
