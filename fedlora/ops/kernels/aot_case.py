"""AotCase: one way in which a kernel is launched, to be compiled where there is no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """A kernel with everything that its compilation depends on.

    Attributes:
        kernel: what `triton.jit` made.
        signature: type of every argument that is no constant ("*bf16", "i32"), by name.
        constexprs: the constants, by name.
        num_warps: of a program.
        num_stages: of its loops' pipelines.
        fused: whether a product and a sum may become one operation, which rounds once.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    fused: bool = True
