"""Dense float64 references of every adapter method: the obvious slow formulas.

`delta` is the weight change (d, k) relative to W0; `sample_grads` are the closed forms of the
per-sample gradients, from x (N, T, k) and the gradient g (N, T, d) of each sample's loss.
"""

import math

import torch
from torch import Tensor


def blocks(size: int, b: int) -> list[range]:
    return [range(start, min(start + b, size)) for start in range(0, size, b)]


def bone(w: Tensor, factor: Tensor, by_row: bool) -> Tensor:
    d, k = w.shape
    b = factor.shape[-1]
    delta = torch.zeros(d, k, dtype=w.dtype)
    for i, rows in enumerate(blocks(d, b)):
        for j, columns in enumerate(blocks(k, b)):
            shared = factor[j if by_row else i]
            for o, row in enumerate(rows):
                for c, column in enumerate(columns):
                    product = sum(w[row, e] * shared[a, c] for a, e in enumerate(columns))
                    delta[row, column] = product + shared[o, c]
    return delta


def miss(d: int, k: int, factor: Tensor) -> Tensor:
    height, rank = factor.shape
    delta = torch.zeros(d, k, dtype=factor.dtype)
    for o in range(d):
        for c in range(k):
            delta[o, c] = factor[o % height, c % rank]
    return delta


def xs_pair(layer, basis) -> tuple[Tensor, Tensor]:
    """A (r, k) and B (d, r) of a LoRA-XS layer; a small client takes the leading slots."""
    a, b = basis[f"{layer.name}.A"], basis[f"{layer.name}.B"]
    return a[: layer.rank], b[:, : layer.rank]


def delta(method, layer, w, factors, basis) -> Tensor:
    """The weight change (d, k) in float64."""
    w = w.double()
    f = {name: tensor.double() for name, tensor in factors.items()}
    frozen = {name: tensor.double() for name, tensor in basis.items()}
    s = layer.scale
    if method in ("lora", "rslora"):
        return s * f["B"] @ f["A"]
    if method == "pissa":
        a0, b0 = frozen[f"{layer.name}.A0"], frozen[f"{layer.name}.B0"]
        return s * (f["B"] @ f["A"] - b0 @ a0)
    if method == "lora-xs":
        a, b = xs_pair(layer, frozen)
        return s * b @ f["R"] @ a
    if method == "dora":
        v = w + s * f["B"] @ f["A"]
        return torch.diag(f["m"] / v.norm(dim=1)) @ v - w
    if method == "vera":
        a = frozen["shared.A"][: layer.rank, : layer.inp]
        b = frozen["shared.B"][: layer.out, : layer.rank]
        return torch.diag(f["b"]) @ b @ torch.diag(f["v"]) @ a
    if method == "miss":
        return miss(layer.out, layer.inp, f["D"])
    return bone(w, f["B"], by_row=method == "bone-row")


def scale(method: str, rank: int, alpha: float) -> float:
    """The papers' scales."""
    if method in ("lora", "dora", "pissa", "lora-xs"):
        return alpha / rank
    return alpha / math.sqrt(rank) if method == "rslora" else 1.0


def sample_grads(method, layer, w, factors, basis, x, g) -> dict[str, Tensor]:
    """Factor name -> (N, shape of the factor), float64."""
    per_sample = [
        one_sample_grads(
            method,
            layer,
            w.double(),
            {name: tensor.double() for name, tensor in factors.items()},
            {name: tensor.double() for name, tensor in basis.items()},
            x[n].double(),
            g[n].double(),
        )
        for n in range(x.shape[0])
    ]
    return {name: torch.stack([grads[name] for grads in per_sample]) for name in factors}


def one_sample_grads(method, layer, w, f, basis, x, g) -> dict[str, Tensor]:
    """Closed forms for one sample; x (T, k), g (T, d)."""
    s = layer.scale
    tokens = range(x.shape[0])
    if method in ("lora", "rslora", "pissa"):
        return {
            "A": s * sum(torch.outer(f["B"].T @ g[t], x[t]) for t in tokens),
            "B": s * sum(torch.outer(g[t], f["A"] @ x[t]) for t in tokens),
        }
    if method == "lora-xs":
        a, b = xs_pair(layer, basis)
        return {"R": s * sum(torch.outer(b.T @ g[t], a @ x[t]) for t in tokens)}
    if method == "dora":
        v = w + s * f["B"] @ f["A"]
        n = v.norm(dim=1)
        inner = [g[t] * f["m"] / n for t in tokens]
        return {
            "A": s * sum(torch.outer(f["B"].T @ inner[t], x[t]) for t in tokens),
            "B": s * sum(torch.outer(inner[t], f["A"] @ x[t]) for t in tokens),
            "m": sum(g[t] * (v @ x[t]) / n for t in tokens),
        }
    if method == "vera":
        a = basis["shared.A"][: layer.rank, : layer.inp]
        b = basis["shared.B"][: layer.out, : layer.rank]
        return {
            "b": sum(g[t] * (b @ (f["v"] * (a @ x[t]))) for t in tokens),
            "v": sum((a @ x[t]) * (b.T @ (f["b"] * g[t])) for t in tokens),
        }
    if method == "miss":
        height, rank = f["D"].shape
        grad = torch.zeros(height, rank, dtype=x.dtype)
        for t in tokens:
            for o in range(layer.out):
                for c in range(layer.inp):
                    grad[o % height, c % rank] += g[t, o] * x[t, c]
        return {"D": grad}
    return {"B": bone_grad(w, f["B"], x, g, by_row=method == "bone-row")}


def bone_grad(w: Tensor, factor: Tensor, x: Tensor, g: Tensor, by_row: bool) -> Tensor:
    """The dense gradient G = sum_t g x^T, pulled back through W_ij B + B block by block."""
    dense = g.T @ x  # (d, k)
    d, k = w.shape
    b = factor.shape[-1]
    grad = torch.zeros_like(factor)
    for i, rows in enumerate(blocks(d, b)):
        for j, columns in enumerate(blocks(k, b)):
            r, c = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            part = dense[r, c]
            target = grad[j if by_row else i]
            target[: len(columns), : len(columns)] += w[r, c].T @ part
            target[: len(rows), : len(columns)] += part
    return grad
