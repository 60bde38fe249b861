"""Aggregation strategies: one paper per file, looked up by name in `STRATEGIES`."""

from fedlora.strategies.base import Strategy
from fedlora.strategies.fedex_lora import FedExLora
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.fedsvd import FedSvd
from fedlora.strategies.ffa_lora import FfaLora
from fedlora.strategies.flexlora import FlexLora
from fedlora.strategies.flora import Flora
from fedlora.strategies.lora_fair import LoraFair
from fedlora.strategies.rolora import RoLora

STRATEGIES: dict[str, type[Strategy]] = {
    "fedex-lora": FedExLora,
    "fedit": FedIT,
    "fedsvd": FedSvd,
    "ffa-lora": FfaLora,
    "flexlora": FlexLora,
    "flora": Flora,
    "lora-fair": LoraFair,
    "rolora": RoLora,
}

__all__ = ["STRATEGIES", "Strategy"]
