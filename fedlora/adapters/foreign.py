"""LoRA adapters that the PEFT library saved, read as our own.

The format is that of `peft.PeftModel.save_pretrained`, see `fedlora.adapters.export`. The
files are another program's: whatever in them would change what the adapter computes, and is
not LoRA, rsLoRA or DoRA on linear layers, is refused.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec, tensors_digest
from fedlora.adapters.export import CONFIG_NAME, PREFIX, TENSORS_NAME
from fedlora.errors import AdapterError

MAX_CONFIG_BYTES = 1 << 20

# PEFT's key ending -> our factor
_ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}

# settings that change the function in ways these factors do not express, when they are set
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)

# initialisations that replace the base weight by a residual
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def import_peft(folder: str | Path) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Spec (base_fingerprint "" and seed 0) and float32 tensors of a PEFT LoRA folder.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is of another kind.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    try:
        saved = load_file(folder / TENSORS_NAME)
    except (OSError, SafetensorError) as e:
        raise AdapterError(
            f"{folder / TENSORS_NAME} is not a readable safetensors file: {e}"
        ) from e
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    modules = config.get("modules_to_save") or []
    tensors: dict[str, Tensor] = {}
    heads: set[str] = set()
    layers: set[str] = set()
    for key, tensor in sorted(saved.items()):
        name = key.removeprefix(PREFIX)
        if not torch.is_floating_point(tensor) or not bool(tensor.isfinite().all()):
            raise AdapterError(f"{key} is not a tensor of finite numbers; save the adapter again")
        ending = next((e for e in _ENDINGS if name.endswith(e)), None)
        if ending is not None and key.startswith(PREFIX):
            layer = name.removesuffix(ending)
            layers.add(layer)
            name = f"{layer}.{_ENDINGS[ending]}"
        else:
            heads.add(_head(key, modules))
        tensors[name] = tensor.float()
    if not layers:
        raise AdapterError(f"{folder / TENSORS_NAME} holds no LoRA factors of linear layers")
    specs = tuple(_layer(name, tensors, config, method) for name in sorted(layers))
    spec = AdapterSpec(
        method=method,
        rank=max(layer.rank for layer in specs),
        alpha=float(config["lora_alpha"]),
        layers=specs,
        heads=tuple(sorted(heads)),
        head_shapes={
            name: tuple(tensor.shape)
            for name, tensor in tensors.items()
            if any(name.startswith(head + ".") for head in heads)
        },
        base_fingerprint="",
        seed=0,
        basis_digest=tensors_digest({}),
    )
    return spec, tensors


def _read_config(path: Path) -> dict[str, Any]:
    """The settings, with every value that is used checked."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise AdapterError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} describes {kind!r}; only PEFT adapters of type LORA are read")
    if found := [key for key in _UNSUPPORTED if config.get(key)]:
        raise AdapterError(f"{path} uses {', '.join(found)}, which fedlora has no form for")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path} has bias = {config['bias']!r}; only 'none' is read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_STARTS):
        raise AdapterError(
            f"{path} has init_lora_weights = {start!r}, so its base is not the original one; "
            "save it with path_initial_model_for_weight_conversion first"
        )
    alphas = config.get("alpha_pattern") or {}
    modules = config.get("modules_to_save") or []
    if not isinstance(alphas, dict) or not all(
        _is_number(value) for value in (config.get("lora_alpha"), *alphas.values())
    ):
        raise AdapterError(f"{path}: lora_alpha and alpha_pattern must be finite numbers")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise AdapterError(f"{path}: modules_to_save must be a list of names")
    return config


def _is_number(value: Any) -> bool:
    # the bound keeps integers of any length out of float()
    return type(value) in (int, float) and abs(value) < 1e300


def _layer(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], method: str
) -> LayerSpec:
    """The layer whose factors these are; shapes say its rank."""
    wanted = ("A", "B", "m") if method == "dora" else ("A", "B")
    found = {factor: tensors.get(f"{name}.{factor}") for factor in ("A", "B", "m")}
    shapes = {factor: tuple(t.shape) for factor, t in found.items() if t is not None}
    a, b = shapes.get("A", ()), shapes.get("B", ())
    fits = (
        set(shapes) == set(wanted)
        and len(a) == len(b) == 2
        and a[0] == b[1] > 0
        and shapes.get("m", b[:1]) == b[:1]
    )
    if not fits:
        raise AdapterError(
            f"layer {name} has factors of shapes {shapes}; expected {', '.join(wanted)} with "
            "A (r, k), B (d, r) and m (d,)"
        )
    alpha = _alpha(name, config)
    scale = alpha / math.sqrt(a[0]) if config.get("use_rslora") else alpha / a[0]
    return LayerSpec(name, b[0], a[1], a[0], scale)


def _alpha(name: str, config: Mapping[str, Any]) -> float:
    """PEFT's rule: the first pattern that matches the end of the name, else lora_alpha."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        except re.error as e:
            raise AdapterError(f"alpha_pattern {pattern!r} is not a regular expression: {e}") from e
    return float(config["lora_alpha"])


def _head(key: str, modules: list[str]) -> str:
    """The fully trained module that the tensor `key` belongs to."""
    path = key.removeprefix(PREFIX).split(".")
    for end in range(1, len(path)):
        head = ".".join(path[:end])
        if any(head == name or head.endswith("." + name) for name in modules):
            return head
    raise AdapterError(f"{key} is neither a LoRA factor of a linear layer nor in modules_to_save")
