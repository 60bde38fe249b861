"""Trained parameters against published counts.

PEFT's method comparison, Llama-3.2-3B, q_proj (3072 -> 3072) and v_proj (3072 -> 1024) of 28
layers: https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA. Bone's
87 031 808 for LLaMA2-7B is the 87.0M of its paper, LoRA-XS's 917 504 the 0.92M of its paper for
Mistral-7B, which has as many layers.
"""

import math

import pytest

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError

LLAMA3_QV = {f"{i}.{n}": (d, 3072) for i in range(28) for n, d in (("q", 3072), ("v", 1024))}
LLAMA2_ALL = {
    f"{i}.{name}": shape
    for i in range(32)
    for name, shape in {
        **dict.fromkeys("qkvo", (4096, 4096)),
        "gate": (11008, 4096),
        "up": (11008, 4096),
        "down": (4096, 11008),
    }.items()
}


def count(method: str, shapes, rank: int, **options) -> int:
    chosen = METHODS[method]
    layers = chosen.plan(shapes, rank, 1.0, chosen.check_options(options))
    return sum(
        math.prod(shape) for layer in layers for shape in chosen.factor_shapes(layer).values()
    )


@pytest.mark.parametrize(
    ("method", "rank", "options", "expected"),
    [
        ("lora", 32, {}, 9_175_040),
        ("lora", 64, {}, 18_350_080),
        ("rslora", 64, {}, 18_350_080),
        ("pissa", 32, {}, 9_175_040),
        ("dora", 32, {}, 9_289_728),
        ("vera", 256, {}, 129_024),
        ("miss", 64, {}, 7_340_032),
        ("miss", 64, {"r2": 64}, 229_376),
        ("bone-col", 64, {}, 7_340_032),
    ],
)
def test_llama3_counts(method, rank, options, expected):
    assert count(method, LLAMA3_QV, rank, **options) == expected


@pytest.mark.parametrize(
    ("method", "rank", "expected"),
    [
        ("bone-col", 64, 87_031_808),
        ("bone-row", 64, 72_876_032),
        ("lora", 36, 89_948_160),
        ("lora-xs", 64, 917_504),
    ],
)
def test_llama2_counts(method, rank, expected):
    assert count(method, LLAMA2_ALL, rank) == expected


def test_bone_counts_whole_blocks_when_b_does_not_divide():
    assert count("bone-col", {"x": (10, 7)}, 4) == 3 * 16
    assert count("bone-row", {"x": (10, 7)}, 4) == 2 * 16


@pytest.mark.parametrize(
    ("method", "rank", "options", "message"),
    [
        ("lora", 8, {}, "rank is larger than 7"),
        ("lora-xs", 8, {}, "rank is larger than 7"),
        ("miss", 8, {}, "rank is larger than 7"),
        ("miss", 4, {"r2": 3}, "r2 = 3 does not divide 10"),
        ("miss", 4, {"r2": -2}, "r2 = -2 does not divide 10"),
        ("bone-col", 4, {"strict_divisible": True}, "4 must divide both"),
        ("bone-row", 5, {"strict_divisible": True}, "5 must divide both"),
        ("bone-col", 8, {}, "rank is larger than 7"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(method, rank, options, message):
    with pytest.raises(ConfigError, match=message):
        count(method, {"x": (10, 7)}, rank, **options)


def test_vera_rank_may_exceed_the_layer():
    assert count("vera", {"x": (10, 7)}, 256) == 10 + 256


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_with_a_scale_use_alpha(method):
    scales = {METHODS[method].scale(4, alpha) for alpha in (1.0, 8.0)}
    assert (len(scales) == 2) == METHODS[method].uses_alpha
