"""Compiled layers: the repeated layers of a model by torch.compile, for local training."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedlora.adapters.inject import AdaptedModel
from fedlora.errors import ConfigError

# of torch.compile; its tests take one that needs no compiler
BACKEND = "inductor"


@contextmanager
def compiled_layers(adapted: AdaptedModel, *, on: bool) -> Iterator[None]:
    """Inside, if `on`, the layers run compiled; lengths of texts are dynamic.

    Layers are compiled one by one, as they are alike, on first use. What is compiled stays so
    for the life of the process, so that a later round does not compile again.

    Raises:
        ConfigError: the model has no repeated layers, or there is no compiler.
    """
    layers = _repeated(adapted.model) if on else []
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _repeated(model: nn.Module) -> list[nn.Module]:
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ConfigError(
            f"training.compile = true: {type(model).__name__} has no list of "
            f"{count} layers; set training.compile = false"
        )
    on_cpu = next(model.parameters()).device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and BACKEND == "inductor" and shutil.which(compiler) is None:
        raise ConfigError(
            f"training.compile = true needs a C++ compiler, and {compiler!r} is not found; install "
            "one, name it in CXX, or set training.compile = false"
        )
    # the loop is run for code that torch keeps by layer
    torch._dynamo.config.cache_size_limit = max(
        torch._dynamo.config.cache_size_limit, 4 * len(found[0])
    )
    return found[0]
