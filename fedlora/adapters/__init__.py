"""Adapter methods: one file per method, looked up by name in `METHODS`."""

from fedlora.adapters.base import AdapterLayer, Method
from fedlora.adapters.bone import Bone
from fedlora.adapters.dora import Dora
from fedlora.adapters.lora import Lora
from fedlora.adapters.lora_xs import LoraXs
from fedlora.adapters.miss import Miss
from fedlora.adapters.pissa import Pissa
from fedlora.adapters.vera import Vera

METHODS: dict[str, Method] = {
    "lora": Lora("lora"),
    "rslora": Lora("rslora", stabilised=True),
    "dora": Dora(),
    "pissa": Pissa(),
    "lora-xs": LoraXs(),
    "vera": Vera(),
    "miss": Miss(),
    "bone-col": Bone("bone-col", by_row=False),
    "bone-row": Bone("bone-row", by_row=True),
}

__all__ = ["METHODS", "AdapterLayer", "Method"]
