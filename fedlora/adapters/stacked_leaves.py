"""Leaf modules that hold the values of several clients; see `StackedModel`."""

import torch
from torch import Tensor, nn


class StackedLeaf(nn.Module):
    """The leaves of K clients in one; without values it is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)
        self.bias: Tensor | None = None

    def per_client(self, x: Tensor) -> Tensor:
        """The rows of x (K n, ..., f) by client, (K, rows, f)."""
        return x.reshape(self.weight.shape[0], -1, x.shape[-1])


class StackedLinear(StackedLeaf):
    """y = x W_c^T + b_c with W (K, out, in) and b (K, out), for the rows of client c."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.per_client(x)
        if self.bias is None:
            y = torch.bmm(rows, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias[:, None], rows, self.weight.mT)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class StackedScale(StackedLeaf):
    """y = x * v_c with v (K, f)."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.per_client(x) * self.weight[:, None]).view(x.shape)


class StackedBlocks(StackedLeaf):
    """`BlockDiagLinear` with blocks B (K, n, b, b)."""

    def forward(self, x: Tensor) -> Tensor:
        _, n, b, _ = self.weight.shape
        rows = self.per_client(x)
        rows = rows.view(*rows.shape[:-1], n, b)
        return torch.einsum("krji,kjoi->krjo", rows, self.weight).reshape(x.shape)
