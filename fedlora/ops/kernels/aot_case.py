"""AotCase: one way in which a kernel is launched, to be compiled where there is no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """A kernel with everything that its compilation depends on.

    Attributes:
        kernel: what `triton.jit` made.
        signature: type of every argument that is no constant ("*bf16", "i32"), by name; with
            what a launch finds out about it, as in Triton's tools: "*bf16:16" is aligned to 16
            bytes, "i32:16" a multiple of 16, and "i32:1" is 1.
        constexprs: the constants, by name.
        num_warps: of a program.
        num_stages: of its loops' pipelines.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3


def aligned(
    signature: Mapping[str, str], *, one: tuple[str, ...] = (), free: tuple[str, ...] = ()
) -> dict[str, str]:
    """`signature` as a launch finds it whose shapes suit the GPU: multiples of 16 throughout.

    Args:
        signature: types by name.
        one: arguments that are 1, such as the stride between neighbours.
        free: arguments that may be any number.
    """
    hints = {
        **dict.fromkeys(signature, ":16"),
        **dict.fromkeys(one, ":1"),
        **dict.fromkeys(free, ""),
    }
    return {name: kind + hints[name] for name, kind in signature.items()}
