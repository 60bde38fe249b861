"""How long a function takes on its device, and the most memory it takes there."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Run = Callable[[], object]


def milliseconds(run: Run, device: str, *, graphed: bool = False) -> float:
    """Median time of a call; on a GPU with its cache flushed in between.

    Args:
        graphed: as a CUDA graph, so that launches cost nothing; on a GPU only.
    """
    if device == "cpu":
        run()
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - started))
        return median(taken)
    from triton import testing

    if graphed:
        return float(testing.do_bench_cudagraph(run, return_mode="median"))
    return float(testing.do_bench(run, return_mode="median"))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as long the first took, repeat by repeat."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def peak_bytes(run: Run, device: str) -> int:
    """Most memory of a GPU during a call above what it held before; 0 on a CPU."""
    if device == "cpu":
        run()
        return 0
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
