"""Aggregation strategies: one paper per file, looked up by name in `STRATEGIES`."""

from fedlora.strategies.base import Strategy
from fedlora.strategies.fed_sb import FedSB
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.fedsa_lora import FedSALora
from fedlora.strategies.ffa_lora import FfaLora
from fedlora.strategies.hetlora import HetLora
from fedlora.strategies.lora_a2 import LoraA2
from fedlora.strategies.lora_lego import LoraLego
from fedlora.strategies.rolora import RoLora

STRATEGIES: dict[str, type[Strategy]] = {
    "fed-sb": FedSB,
    "fedit": FedIT,
    "fedsa-lora": FedSALora,
    "ffa-lora": FfaLora,
    "hetlora": HetLora,
    "lora-a2": LoraA2,
    "lora-lego": LoraLego,
    "rolora": RoLora,
}

__all__ = ["STRATEGIES", "Strategy"]
