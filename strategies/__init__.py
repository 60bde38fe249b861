"""Aggregation strategies: one paper per file, looked up by name in `STRATEGIES`."""

from typing import TYPE_CHECKING, Any

from fedlora.strategies.base import Strategy
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.ffa_lora import FfaLora
from fedlora.strategies.rolora import RoLora

STRATEGIES: dict[str, type[Strategy]] = {
    "fedit": FedIT,
    "ffa-lora": FfaLora,
    "rolora": RoLora,
}

if TYPE_CHECKING:
    from fedlora.strategies.to_flower import as_flower

__all__ = ["STRATEGIES", "Strategy", "as_flower"]


def __getattr__(name: str) -> Any:
    if name != "as_flower":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Flower takes a second to import, and need not be installed
    from fedlora.strategies.to_flower import as_flower

    return as_flower
