"""What the LoRA linears of one decoder layer cost, counted where there is no GPU.

    python -m benchmarks.kernels.counting

Writes kernels.md into --out.

Runs forward and backward on tensors without data and counts kernels, the bytes they read and
write (every operand once, as if nothing stayed in a cache), and the bytes kept for backward.
Layers are those of Llama 3.2 1B and Llama 3 8B; activations, weights and factors are bfloat16.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.lora_linear import lora_linears

# inputs and outputs of the linears of each input: q k v, o, gate up, down
LAYERS = {
    "1B": ((2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,))),
    "8B": ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))),
}
RANK, SCALE = 16, 2.0
# ops without a kernel
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
RESHAPES = {"_unsafe_view", "_reshape_alias"}


@dataclass
class Count:
    """Of one forward and backward pass."""

    kernels: int = 0
    moved: int = 0
    saved: int = 0


class Counting(TorchDispatchMode):
    """Counts every op that is neither a view nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        results = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        if view or name in ALLOCATIONS | RESHAPES:
            return made
        # what is multiplied by zero is not read
        read = args[1:] if kwargs.get("beta") == 0 else args
        written = made if results else args[0]
        self.count.kernels += 1
        self.count.moved += sum(map(size, tensors(read))) + sum(map(size, tensors(written)))
        return made


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in an argument or result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []


def size(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


@dataclass
class Linears:
    """Linears of one input, without data."""

    weights: list[Tensor]
    a_s: list[Tensor]
    a: Tensor  # all A below one another
    b_s: list[Tensor]
    key: Tensor


Forward = Callable[[Tensor, Linears], Sequence[Tensor]]


def ours(x: Tensor, linears: Linears) -> Sequence[Tensor]:
    """Stacked LoRA."""
    return _ours(x, linears, linears.a)


def ours_apart(x: Tensor, linears: Linears) -> Sequence[Tensor]:
    """Stacked LoRA of factors that are not stacked in memory."""
    return _ours(x, linears, linears.a_s)


def ours_dropped(x: Tensor, linears: Linears) -> Sequence[Tensor]:
    """Stacked LoRA with dropout, by kernels; one that adds parts up afterwards is counted once."""
    return _ours(x, linears, linears.a, Dropout(0.1, linears.key))


def _ours(
    x: Tensor, linears: Linears, a: Tensor | Sequence[Tensor], dropout: Dropout | None = None
) -> Sequence[Tensor]:
    n = len(linears.weights)
    return lora_linears(x, linears.weights, [None] * n, a, linears.b_s, [SCALE] * n, dropout)


def plain(x: Tensor, linears: Linears) -> Sequence[Tensor]:
    """Every operation by itself."""
    return [
        F.linear(x, w) + SCALE * F.linear(F.linear(x, a), b)
        for w, a, b in zip(linears.weights, linears.a_s, linears.b_s, strict=True)
    ]


def plain_dropped(x: Tensor, linears: Linears) -> Sequence[Tensor]:
    """Every operation by itself, with dropout as a GPU does it."""
    return [
        F.linear(x, w) + SCALE * F.linear(F.linear(torch.native_dropout(x, 0.1, True)[0], a), b)
        for w, a, b in zip(linears.weights, linears.a_s, linears.b_s, strict=True)
    ]


def counted(forward: Forward, layer: str, tokens: int, factors: torch.dtype) -> Count:
    """Of the linears of one layer."""
    total = Count()
    for inp, outs in LAYERS[layer]:
        x = _meta(tokens, inp).requires_grad_()
        weights = [_meta(out, inp) for out in outs]
        a_s = [_meta(RANK, inp).to(factors).requires_grad_() for _ in outs]
        a = _meta(RANK * len(outs), inp).to(factors).requires_grad_()
        b_s = [_meta(out, RANK).to(factors).requires_grad_() for out in outs]
        key = torch.empty((), dtype=torch.int64, device="meta")
        trained = (a, *a_s, *b_s)
        known = {t.untyped_storage()._cdata for t in (*weights, *trained)}
        kept: dict[int, int] = {}
        with Counting() as mode:
            with torch.autograd.graph.saved_tensors_hooks(_keeper(known, kept), lambda t: t):
                ys = forward(x, Linears(weights, a_s, a, b_s, key))
            slopes = [torch.empty_like(y) for y in ys]
            torch.autograd.grad(ys, (x, *trained), slopes, allow_unused=True)
        total.kernels += mode.count.kernels
        total.moved += mode.count.moved
        total.saved += sum(kept.values())
    return total


def _keeper(known: set[int], kept: dict[int, int]) -> Callable[[Tensor], Tensor]:
    """What writes the size of everything saved, but for weights and factors, into `kept`."""

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()._cdata
        if storage not in known:
            kept[storage] = size(t)
        return t

    return keep


def frozen(layer: str, tokens: int) -> Count:
    """Of the frozen products alone, with the gradients of their inputs."""
    total = Count()
    for inp, outs in LAYERS[layer]:
        for out in outs:
            total.kernels += 2
            total.moved += 2 * 2 * (tokens * inp + tokens * out + inp * out)
    return total


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def page(tokens: int) -> str:
    """The counts of both layers as markdown."""
    out = [
        "# What the LoRA linears of a decoder layer cost, counted",
        "",
        "`python -m benchmarks.kernels.counting`: forward and backward on tensors without data, "
        f"{tokens} tokens, rank {RANK}. Bytes are those above the frozen products, every operand "
        "once; kept is what backward needs, in KiB for every token.",
        "",
        "| layer | linears | factors | kernels | extra GB | kept |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for layer in LAYERS:
        base = frozen(layer, tokens)
        out.append(f"| {layer} | frozen | - | {base.kernels} | - | - |")
        for forward, name in NAMES.items():
            for factors in (torch.bfloat16, torch.float32):
                if forward in (plain, plain_dropped) and factors == torch.float32:
                    continue
                count = counted(forward, layer, tokens, factors)
                kind = str(factors).removeprefix("torch.")
                out.append(
                    f"| {layer} | {name} | {kind} | {count.kernels} | "
                    f"{(count.moved - base.moved) / 1e9:.2f} | {count.saved / tokens / 1024:.1f} |"
                )
    # imported here, as it counts with this module
    from benchmarks.kernels.wired import wired

    out += [
        "",
        "The same linears as a model runs them (all seven of a layer, with the casts of float32 "
        "masters to bfloat16 and of their gradients back; sums of gradients that the plain layer "
        "makes and this one does not are taken off):",
        "",
        "| layer | factors | dropout | kernels |",
        "| --- | --- | ---: | ---: |",
    ]
    for layer in LAYERS:
        for factors in (torch.bfloat16, torch.float32):
            for rate in (0.0, 0.1):
                kind = str(factors).removeprefix("torch.")
                out.append(f"| {layer} | {kind} | {rate:g} | {wired(layer, factors, rate)} |")
    return "\n".join([*out, ""])


NAMES: dict[Forward, str] = {
    ours: "ours, stacked",
    ours_apart: "ours, factors apart in memory",
    ours_dropped: "ours, stacked, dropout 0.1",
    plain: "every operation by itself",
    plain_dropped: "every operation by itself, dropout 0.1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    (given.out / "kernels.md").write_text(page(given.tokens))


if __name__ == "__main__":
    main()
