"""One-shot merging of trained adapters: one method per file, by name in `MERGERS`."""

from fedlora.merging.base import Given, Merger
from fedlora.merging.dare import Dare
from fedlora.merging.fedex_lora import FedExLora
from fedlora.merging.flexlora import FlexLora
from fedlora.merging.flora import Flora
from fedlora.merging.lora_lego import LoraLego
from fedlora.merging.regmean import RegMean
from fedlora.merging.task_arithmetic import TaskArithmetic
from fedlora.merging.ties import Ties

MERGERS: dict[str, type[Merger]] = {
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "regmean": RegMean,
    "lora-lego": LoraLego,
    "flexlora": FlexLora,
    "fedex-lora": FedExLora,
    "flora": Flora,
}

__all__ = ["MERGERS", "Given", "Merger"]
