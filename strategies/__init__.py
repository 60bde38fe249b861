"""Aggregation strategies: one paper per file, looked up by name in `STRATEGIES`."""

from typing import TYPE_CHECKING, Any

from fedlora.strategies.base import Strategy
from fedlora.strategies.fed_sb import FedSB
from fedlora.strategies.fedex_lora import FedExLora
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.fedsa_lora import FedSALora
from fedlora.strategies.fedsvd import FedSvd
from fedlora.strategies.ffa_lora import FfaLora
from fedlora.strategies.flexlora import FlexLora
from fedlora.strategies.flora import Flora
from fedlora.strategies.hetlora import HetLora
from fedlora.strategies.lora_a2 import LoraA2
from fedlora.strategies.lora_fair import LoraFair
from fedlora.strategies.lora_lego import LoraLego
from fedlora.strategies.rolora import RoLora

STRATEGIES: dict[str, type[Strategy]] = {
    "fed-sb": FedSB,
    "fedex-lora": FedExLora,
    "fedit": FedIT,
    "fedsa-lora": FedSALora,
    "fedsvd": FedSvd,
    "ffa-lora": FfaLora,
    "flexlora": FlexLora,
    "flora": Flora,
    "hetlora": HetLora,
    "lora-a2": LoraA2,
    "lora-fair": LoraFair,
    "lora-lego": LoraLego,
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
