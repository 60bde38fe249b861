"""Wrappers: what stands around a strategy and composes with it, looked up in `WRAPPERS`."""

from fedlora.strategies.wrappers.base import Wrapper

WRAPPERS: dict[str, type[Wrapper]] = {}

__all__ = ["WRAPPERS", "Wrapper"]
