"""What the LoRA linears of a decoder layer may cost: counts, which need no GPU.

The bars are those of stacked LoRA by the vendor's products alone; plain LoRA takes 87 kernels and
6.2 GB beside the frozen products.
"""

import pytest
import torch

from benchmarks.kernels.counting import counted, frozen, ours, ours_apart, ours_dropped, plain
from benchmarks.kernels.wired import wired

TOKENS = 8192


@pytest.mark.parametrize("forward", [ours, ours_dropped])
@pytest.mark.parametrize("layer", ["1B", "8B"])
def test_kernels(forward, layer):
    assert counted(forward, layer, TOKENS, torch.bfloat16).kernels <= 47


@pytest.mark.parametrize("layer", ["1B", "8B"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_kernels_as_the_model_runs_them(layer, rate):
    """Float32 masters add their casts: of four stacked A, seven B, and of the gradients."""
    kernels = wired(layer, torch.bfloat16, rate)
    assert kernels <= 47
    assert wired(layer, torch.float32, rate) - kernels <= 2 * (4 + 7)


def test_factors_apart_cost_a_copy_for_each_input_of_several():
    assert counted(ours_apart, "1B", TOKENS, torch.bfloat16).kernels <= 49


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_moved(factors):
    """Copies of float32 masters are small beside activations."""
    extra = counted(ours, "1B", TOKENS, factors).moved - frozen("1B", TOKENS).moved
    assert extra <= (2.6e9 if factors == torch.bfloat16 else 2.62e9)


@pytest.mark.parametrize("forward", [ours, ours_apart, ours_dropped])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_kept(forward, factors):
    assert counted(forward, "1B", TOKENS, factors).saved / TOKENS <= 28.5 * 1024


def test_dropout_keeps_nothing_but_its_key():
    """One key of 8 bytes for each of a layer's four inputs."""
    with_dropout = counted(ours_dropped, "1B", TOKENS, torch.bfloat16).saved
    assert with_dropout - counted(ours, "1B", TOKENS, torch.bfloat16).saved == 4 * 8


def test_the_counter_sees_what_is_not_fused():
    assert counted(plain, "1B", TOKENS, torch.bfloat16).kernels == 87
