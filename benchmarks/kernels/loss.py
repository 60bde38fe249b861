"""The loss of a large vocabulary under a frozen head, beside whole logits and Liger's fused loss.

    python -m benchmarks.kernels.loss [--device cuda]

Prints one JSON object of figures by bar. Liger is measured where liger-kernel is installed.
"""

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.timing import milliseconds, peak_bytes, ratios
from fedlora.ops.linear_ce import linear_ce

GIB = 2**30


def figures(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, list[float]]:
    """Figures of L1 by bar, for 8,192 rows of width 2,048 and 128,256 words."""
    rows, width, words = (64, 32, 300) if tiny else (8192, 2048, 128_256)
    draws = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=draws, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(words, width, generator=draws, device=device) * width**-0.5).bfloat16()
    target = torch.randint(words, (rows,), generator=draws, device=device)

    def ours() -> Tensor:
        return linear_ce(hidden, weight, None, target)[0].mean()

    def eager() -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), target)

    ways: dict[str, Callable[[], Tensor]] = {"ours": ours, "eager": eager}
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        module = importlib.import_module("liger_kernel.transformers")
        liger = module.LigerFusedLinearCrossEntropyLoss()
        ways["liger"] = lambda: liger(weight, hidden, target)
    steps = {name: lambda way=way: torch.autograd.grad(way(), hidden) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(milliseconds(step, device))
    found = {"L1 time": ratios(taken["ours"], taken["eager"])}
    if "liger" in taken:
        found["L1 Liger"] = ratios(taken["liger"], taken["ours"])
    if device == "cuda":
        found["L1 memory"] = [peak_bytes(steps["ours"], device) / GIB]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
