"""Adapter methods: one file per method, looked up by name in `METHODS`."""

from fedlora.adapters.base import AdapterLayer, Method
from fedlora.adapters.lora import Lora

METHODS: dict[str, Method] = {
    "lora": Lora("lora"),
    "rslora": Lora("rslora", stabilised=True),
}

__all__ = ["METHODS", "AdapterLayer", "Method"]
