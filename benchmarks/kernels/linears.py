"""The LoRA linears of one decoder layer, forward and backward, beside those of others.

    python -m benchmarks.kernels.linears [--device cuda] [--tokens 8192]

Prints one JSON object: for every bar of `bars` that it can judge, a figure for each repeat.
`unsloth's order` restates the sequence of operations of unsloth's fast_lora.py, which keeps
nothing but x and computes x A^T and dY B again; it is not unsloth itself.
"""

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernels.counting import LAYERS, RANK, SCALE
from benchmarks.kernels.timing import milliseconds, peak_bytes, ratios
from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.lora_linear import lora_linears

Forward = Callable[[], Sequence[Tensor]]
Shapes = Sequence[tuple[int, tuple[int, ...]]]
TINY: Shapes = ((64, (64, 16, 16)), (64, (64,)), (64, (128, 128)), (128, (64,)))


class Linears:
    """Weights, factors and inputs of the linears of one layer.

    Args:
        shapes: inputs of each group, and outputs of its linears.
        tokens: rows of every input.
    """

    def __init__(self, shapes: Shapes, tokens: int, device: str, dtype: torch.dtype) -> None:
        draws = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*size, generator=draws, device=device, dtype=torch.float32)
            return (made * scale).to(dtype)

        self.device = device
        self.xs = [normal(tokens, inp).requires_grad_() for inp, _ in shapes]
        self.weights = [[normal(out, inp, scale=inp**-0.5) for out in outs] for inp, outs in shapes]
        self.a_s = [normal(RANK * len(outs), inp, scale=inp**-0.5) for inp, outs in shapes]
        self.b_s = [[normal(out, RANK, scale=0.1) for out in outs] for _, outs in shapes]
        self.slopes = [normal(tokens, out) for _, outs in shapes for out in outs]
        for tensor in (*self.a_s, *(b for group in self.b_s for b in group)):
            tensor.requires_grad_()
        self.key = torch.tensor(7, dtype=torch.int64, device=device)

    def frozen(self) -> list[Tensor]:
        """Without adapters."""
        return [
            F.linear(x, w) for x, group in zip(self.xs, self.weights, strict=True) for w in group
        ]

    def ours(self, rate: float = 0.0) -> list[Tensor]:
        """Stacked."""
        dropout = Dropout(rate, self.key) if rate else None
        made: list[Tensor] = []
        for x, ws, a, bs in zip(self.xs, self.weights, self.a_s, self.b_s, strict=True):
            made += lora_linears(x, ws, [None] * len(ws), a, bs, [SCALE] * len(ws), dropout)
        return made

    def plain(self, rate: float = 0.0) -> list[Tensor]:
        """Every operation by itself."""
        made = []
        for x, ws, a, bs in zip(self.xs, self.weights, self.a_s, self.b_s, strict=True):
            for w, own, b in zip(ws, a.split(RANK), bs, strict=True):
                seen = F.dropout(x, rate) if rate else x
                made.append(F.linear(x, w) + SCALE * F.linear(F.linear(seen, own), b))
        return made

    def unsloth(self) -> list[Tensor]:
        """In unsloth's order of operations."""
        made: list[Tensor] = []
        for x, ws, a, bs in zip(self.xs, self.weights, self.a_s, self.b_s, strict=True):
            made += _Unsloth.apply(x, len(ws), *ws, *a.split(RANK), *bs)
        return made

    def step(self, forward: Forward, trained: Sequence[Tensor] | None = None) -> None:
        """Forward and backward, down to inputs and factors."""
        ys = forward()
        if trained is None:
            trained = [*self.a_s, *(b for group in self.b_s for b in group)]
        torch.autograd.grad(ys, [*self.xs, *trained], self.slopes, allow_unused=True)


class _Unsloth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *tensors)
        ctx.n = n
        ys = []
        for w, a, b in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
            ys.append((x @ w.T).addmm_(x @ a.T, b.T, alpha=SCALE))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        n = ctx.n
        das, dbs, dx = [], [], None
        for dy, w, a, b in zip(dys, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
            das.append((SCALE * (dy @ b)).T @ x)
            dbs.append(dy.T @ (SCALE * (x @ a.T)))
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(dy @ b, a, alpha=SCALE)
        return dx, None, *[None] * n, *das, *dbs


class Peft:
    """The same linears with PEFT's adapters on them."""

    def __init__(self, linears: Linears, rate: float) -> None:
        peft = importlib.import_module("peft")
        names, modules = [], nn.ModuleDict()
        for group, weights in enumerate(linears.weights):
            for place, weight in enumerate(weights):
                names.append(f"l{group}{place}")
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                modules[names[-1]] = linear
        config = peft.LoraConfig(
            r=RANK, lora_alpha=SCALE * RANK, lora_dropout=rate, target_modules=names
        )
        model = peft.PeftModel(modules, config).train()
        self.linears = linears
        self.modules = [model.base_model.model[name] for name in names]
        self.groups = [g for g, weights in enumerate(linears.weights) for _ in weights]
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def forward(self) -> list[Tensor]:
        """Every module on its input."""
        return [
            module(self.linears.xs[group])
            for module, group in zip(self.modules, self.groups, strict=True)
        ]

    def under_autocast(self) -> list[Tensor]:
        """Likewise under autocast to bfloat16."""
        with torch.autocast(self.linears.device, torch.bfloat16):
            return self.forward()


def saved_bytes(forward: Forward) -> int:
    """What is kept for backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def figures(
    device: str, tokens: int, *, tiny: bool = False, repeats: int = 3
) -> dict[str, list[float]]:
    """Figures of K1 to K7 by bar; a peer that is not installed has none."""
    found: dict[str, list[float]] = {}
    for layer in ("1B", "8B"):
        shapes = TINY if tiny else LAYERS[layer]
        linears = Linears(shapes, tokens, device, torch.bfloat16)
        ways = _ways(linears, compiled=device == "cuda")
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (step, graphed) in ways.items():
                taken[name].append(milliseconds(step, device, graphed=graphed))
        for bar, slow, fast in (
            ("K1", "peft", "ours"),
            ("K2", "peft, autocast", "ours"),
            ("K3", "plain", "ours"),
            ("K4", "compiled", "ours, graphed"),
            ("K5", "unsloth's order", "ours"),
            ("K6", "ours", "frozen"),
        ):
            if slow in taken and fast in taken:
                found[f"{bar} {layer}"] = ratios(taken[slow], taken[fast])
        if layer == "1B":
            found["K7 time"] = ratios(taken["ours, dropout"], taken["ours"])
            found |= _dropout_memory(linears, device)
    return found


def _dropout_memory(linears: Linears, device: str) -> dict[str, list[float]]:
    # a processor keeps the mask
    if device != "cuda":
        return {}
    kept = [saved_bytes(forward) for forward in (lambda: linears.ours(0.1), linears.ours)]
    peaks = [
        peak_bytes(lambda way=way: linears.step(lambda: way(0.1)), device)  # type: ignore[misc]
        for way in (linears.ours, linears.plain)
    ]
    return {"K7 saved": [kept[0] / kept[1]], "K7 peak": [peaks[0] / peaks[1]]}


def _ways(linears: Linears, *, compiled: bool) -> dict[str, tuple[Callable[[], None], bool]]:
    """name -> step, and whether it is timed as a CUDA graph."""
    ways = {
        "frozen": (lambda: linears.step(linears.frozen), False),
        "ours": (lambda: linears.step(linears.ours), False),
        "ours, dropout": (lambda: linears.step(lambda: linears.ours(0.1)), False),
        "plain": (lambda: linears.step(linears.plain), False),
        "unsloth's order": (lambda: linears.step(linears.unsloth), False),
    }
    if compiled:
        quick = torch.compile(linears.plain, fullgraph=True)
        ways["compiled"] = (lambda: linears.step(quick), True)
        ways["ours, graphed"] = (lambda: linears.step(linears.ours), True)
    if importlib.util.find_spec("peft") is not None:
        peft = Peft(linears, 0.0)
        ways["peft"] = (lambda: linears.step(peft.forward, peft.trained), False)
        ways["peft, autocast"] = (lambda: linears.step(peft.under_autocast, peft.trained), False)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, given.tokens, tiny=given.tiny)))


if __name__ == "__main__":
    main()
