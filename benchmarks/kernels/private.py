"""A private LoRA step beside a plain one and those of Opacus; see benchmarks/private_step.py.

    python -m benchmarks.kernels.private [--device cuda]

Prints one JSON object of figures by bar.
"""

import argparse
import json

import torch

from benchmarks.kernels.timing import ratios
from benchmarks.private_step import measure
from fedlora.ops.dp_lora_grads import sample_grads, weighted_sum


def figures(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, list[float]]:
    """Figures of D1 to D3 by bar: a Llama as wide and deep as 1B, 16 texts of 512 tokens."""
    layers, hidden, batch, tokens = (1, 32, 4, 8) if tiny else (16, 2048, 16, 512)
    given = argparse.Namespace(
        layers=layers,
        hidden=hidden,
        rank=16,
        batch=batch,
        tokens=tokens,
        repeats=repeats,
        device=device,
    )
    seconds = measure(given)
    ours = seconds["book-keeping"]
    found = {"D1": ratios(ours, seconds["plain"]), "D3": [_error(device)]}
    for way in ("hooks", "ghost"):
        # where Opacus is not installed there is nothing to compare with
        if f"Opacus {way}" in seconds:
            found[f"D2 {way}"] = ratios(seconds[f"Opacus {way}"], ours)
    return found


def _error(device: str) -> float:
    """Relative error of a clipped sum of per-sample gradients, against float64 on the CPU."""
    draws = torch.Generator().manual_seed(0)
    x, g = (torch.randn(8, 32, width, generator=draws) for width in (64, 16))
    grads, squares = sample_grads(x.to(device), g.to(device))
    found = weighted_sum(grads, (1.0 / squares.sqrt()).clamp(max=1.0)).cpu().double()
    each = g.double().mT @ x.double()  # (N, 16, 64)
    norms = torch.linalg.vector_norm(each, dim=(1, 2), keepdim=True)
    wanted = (each / norms.clamp(min=1.0)).sum(0)
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
