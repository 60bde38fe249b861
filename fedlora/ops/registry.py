"""The choice between an op's plain torch definition and its Triton kernel.

FEDLORA_OPS says which: `auto` (the default) takes the kernel for tensors on a GPU where Triton
can be used, `torch` never takes one, `triton` takes it on a GPU or fails, and `interpret` takes
it on the CPU through Triton's interpreter, which is how tests run kernels without a GPU.
"""

import importlib
import logging
import os
from functools import lru_cache

from torch import Tensor

from fedlora.errors import ConfigError

CHOICES = ("auto", "torch", "triton", "interpret")
OLDEST = (3, 6)
log = logging.getLogger(__name__)


def uses_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` takes its Triton kernel.

    Raises:
        ConfigError: FEDLORA_OPS is none of the choices, or asks for a kernel that cannot run.
    """
    choice = os.environ.get("FEDLORA_OPS", "auto")
    if choice == "torch" or (choice == "auto" and not tensor.is_cuda):
        return False
    if choice not in CHOICES:
        raise ConfigError(
            f"FEDLORA_OPS = {choice!r} is not known; set it to one of {', '.join(CHOICES)}"
        )
    problem = _problem()
    if choice == "auto":
        return not problem
    if problem:
        raise ConfigError(f"FEDLORA_OPS = {choice}: {problem}")
    if choice == "interpret":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                "FEDLORA_OPS = interpret needs TRITON_INTERPRET=1, set before the process starts"
            )
        return True
    return tensor.is_cuda


@lru_cache(maxsize=1)
def _problem() -> str:
    """Why Triton cannot be used, said once; or an empty string."""
    try:
        version = str(importlib.import_module("triton").__version__)
    except ImportError:
        problem = "Triton is not installed; install fedlora[triton]"
    else:
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found >= OLDEST:
            return ""
        wanted = ".".join(map(str, OLDEST))
        problem = f"Triton {version} is too old; install {wanted} or newer"
    log.warning("plain torch is used instead of kernels: %s", problem)
    return problem
