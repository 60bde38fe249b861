"""Training mode: what is switched in a model while it trains, and switched back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from fedlora.adapters.inject import AdaptedModel
from fedlora.errors import TrainingError


@contextmanager
def training_mode(adapted: AdaptedModel, *, checkpointing: bool) -> Iterator[None]:
    """Inside, the model trains; afterwards it is in evaluation mode.

    Args:
        checkpointing: activations are recomputed in the backward pass.

    Raises:
        TrainingError: the model cannot recompute activations.
    """
    model: Any = adapted.model
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"{type(model).__name__} does not support gradient checkpointing; set "
            "training.gradient_checkpointing = false"
        )
    model.train()
    for module in model.modules():
        # a norm over the batch would otherwise change the frozen base
        if isinstance(module, _BatchNorm):
            module.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing and hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()
        model.eval()
