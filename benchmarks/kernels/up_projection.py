"""How the second factor joins the frozen product: a race of four ways, forward and backward.

    python -m benchmarks.kernels.up_projection [--device cuda]

`after` adds s S B^T to the finished product, which is what the product does now; `before` starts
from it, so that the frozen product adds itself on; `side by side` keeps [W | s B] in one buffer,
whose product with [X | S] is the whole linear and whose product with dY gives [dX | dS]; `normed`
is that with [X | S] made by the norm before it. `side by side` and `normed` copy B into the
buffer every step, which is part of their time. A fifth way, a Triton product with the
second factor added at its end, is not there: it loses as soon as Triton's product is a tenth
slower than the vendor's.

Another way is worth its layout if a linear wins 3 % with it. Prints one JSON object.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.counting import RANK, SCALE
from benchmarks.kernels.timing import milliseconds, ratios
from fedlora.ops.rmsnorm_shrink import rmsnorm_shrink

WIDTHS = (2048, 4096, 14336)
TOKENS = (512, 2048, 8192)
EPS = 1e-5

Step = Callable[[], tuple[Tensor, ...]]


class Race:
    """One square linear with its adapter, after a norm.

    Args:
        width: inputs and outputs.
        tokens: rows of the input.
    """

    def __init__(self, width: int, tokens: int, device: str, dtype: torch.dtype) -> None:
        draws = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*size, generator=draws, device=device, dtype=torch.float32)
            return (made * scale).to(dtype)

        self.h, self.dy = normal(tokens, width), normal(tokens, width)
        self.norm = 1.0 + normal(width, scale=0.1)
        self.a, self.b = normal(RANK, width, scale=width**-0.5), normal(width, RANK, scale=0.1)
        # columns of one buffer, so that every way reads the same weight
        self.wide = torch.cat([normal(width, width, scale=width**-0.5), SCALE * self.b], 1)
        self.w = self.wide[:, :width].contiguous()
        self.width = width

    def after(self) -> tuple[Tensor, ...]:
        """Output and gradients (y, dx, da, db)."""
        x = self._normed()
        s = x @ self.a.T
        y = (x @ self.w.T).addmm_(s, self.b.T, alpha=SCALE)
        return y, *self._back(x, s)

    def before(self) -> tuple[Tensor, ...]:
        """The same."""
        x = self._normed()
        s = x @ self.a.T
        y = torch.mm(s, self.b.T).mul_(SCALE).addmm_(x, self.w.T)
        ds = torch.mm(self.dy, self.b).mul_(SCALE)
        dx = (ds @ self.a).addmm_(self.dy, self.w)
        return y, dx, ds.T @ x, (self.dy.T @ s).mul_(SCALE)

    def side_by_side(self) -> tuple[Tensor, ...]:
        """The same."""
        both = self.h.new_empty(len(self.h), self.width + RANK)
        x = both[:, : self.width]
        x.copy_(self._normed())
        torch.mm(x, self.a.T, out=both[:, self.width :])
        return self._whole(both)

    def normed(self) -> tuple[Tensor, ...]:
        """The same."""
        return self._whole(rmsnorm_shrink(self.h, self.norm, self.a, EPS))

    def _normed(self) -> Tensor:
        return F.rms_norm(self.h, (self.width,), self.norm, EPS)

    def _back(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ds = torch.mm(self.dy, self.b).mul_(SCALE)
        dx = (self.dy @ self.w).addmm_(ds, self.a)
        return dx, ds.T @ x, (self.dy.T @ s).mul_(SCALE)

    def _whole(self, both: Tensor) -> tuple[Tensor, ...]:
        torch.mul(self.b, SCALE, out=self.wide[:, self.width :])
        x, s = both[:, : self.width], both[:, self.width :]
        y = both @ self.wide.T
        back = self.dy @ self.wide
        dx, ds = back[:, : self.width], back[:, self.width :]
        dx.addmm_(ds, self.a)
        return y, dx, ds.T @ x, (self.dy.T @ s).mul_(SCALE)

    def ways(self) -> dict[str, Step]:
        """Every way by its name."""
        return {
            "after": self.after,
            "before": self.before,
            "side by side": self.side_by_side,
            "normed": self.normed,
        }


def figures(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, list[float]]:
    """Time of `after` in times that of each other way, by way, width and tokens."""
    found = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for width in (64,) if tiny else WIDTHS:
        for tokens in (32,) if tiny else TOKENS:
            steps = Race(width, tokens, device, dtype).ways()
            taken: dict[str, list[float]] = {way: [] for way in steps}
            for _ in range(repeats):
                for way, step in steps.items():
                    taken[way].append(milliseconds(step, device, graphed=device == "cuda"))
            for way in steps:
                if way != "after":
                    key = f"after / {way}, {width}, {tokens} tokens"
                    found[key] = ratios(taken["after"], taken[way])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
