"""Adapters as folders that the PEFT library loads.

The format is that of `peft.PeftModel.save_pretrained`: adapter_config.json and
adapter_model.safetensors, https://huggingface.co/docs/peft/developer_guides/checkpoint.
LoRA, rsLoRA, DoRA, VeRA, MiSS and Bone-col (there "bat") have a form of their own; any other
change of low rank is written as a LoRA of that rank.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedlora.adapter import AdapterSpec, LayerSpec, Tensors, tensors_digest, trained_shapes
from fedlora.adapters import METHODS
from fedlora.adapters.base import Basis
from fedlora.errors import AdapterError
from fedlora.storage import storage_errors, write_atomic

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

Form = tuple[dict[str, Any], dict[str, Tensor]]
Factors = Mapping[str, Mapping[str, Tensor]]


def export_peft(
    spec: AdapterSpec,
    tensors: Tensors,
    basis: Basis,
    folder: str | Path,
    *,
    base_model_name: str,
    task_type: str | None = None,
    conv1d: bool = False,
) -> None:
    """Writes an adapter so that `peft.PeftModel.from_pretrained(base, folder)` computes the same.

    Args:
        tensors: every factor and head parameter of `spec`, by full name.
        basis: the frozen tensors of `spec`.
        base_model_name: hub name or path of the base, as PEFT shall find it.
        task_type: PEFT's name of the task, e.g. "CAUSAL_LM" or "SEQ_CLS".
        conv1d: the base stores weights as (in, out), as GPT-2 does.

    Raises:
        AdapterError: the tensors or the basis are not those of `spec`, or PEFT has no form
            for this adapter.
        StorageError: the folder cannot be written.
    """
    check_complete(spec, tensors, basis)
    factors = {
        layer.name: {
            factor: tensors[f"{layer.name}.{factor}"].detach().cpu()
            for factor in METHODS[spec.method].factor_shapes(layer)
        }
        for layer in spec.layers
    }
    settings, weights = peft_form(spec, factors, basis, conv1d)
    weights |= {PREFIX + name: tensors[name].detach().cpu() for name in spec.head_shapes}
    config = {
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "bias": "none",
        "target_modules": [layer.name for layer in spec.layers],
        "modules_to_save": list(spec.heads) or None,
        **settings,
    }
    folder = Path(folder)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    contiguous = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TENSORS_NAME, save(contiguous, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG_NAME, text.encode())


def check_complete(spec: AdapterSpec, tensors: Tensors, basis: Basis) -> None:
    """Raises AdapterError unless tensors and basis are exactly those of `spec`."""
    expected = trained_shapes(spec, METHODS[spec.method])
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise AdapterError(
                f"{name} has shape {found.get(name, 'none')} in the tensors; expected "
                f"{expected.get(name, 'no such tensor')} for this {spec.method} adapter"
            )
    if tensors_digest(basis) != spec.basis_digest:
        raise AdapterError(
            f"the frozen basis has digest {tensors_digest(basis)[:12]}, the adapter was made "
            f"with {spec.basis_digest[:12]}; export with the basis it was trained with"
        )


def peft_form(spec: AdapterSpec, factors: Factors, basis: Basis, conv1d: bool) -> Form:
    """PEFT's settings and tensors for the layers of `spec`.

    Raises:
        AdapterError: PEFT has no form for this adapter.
    """
    equal_ranks = len({layer.rank for layer in spec.layers}) == 1
    equal_tiles = len({layer.tile for layer in spec.layers}) == 1
    if spec.method in ("lora", "rslora", "dora"):
        return _lora(spec, factors, conv1d)
    if spec.method == "vera":
        return _vera(spec, factors, basis, conv1d)
    if spec.method == "miss" and equal_ranks and equal_tiles and not conv1d:
        return _miss(spec, factors)
    if spec.method == "bone-col" and equal_ranks and not conv1d:
        divisible = all(x.out % x.rank == 0 and x.inp % x.rank == 0 for x in spec.layers)
        if divisible:
            return _bat(spec, factors)
    return _expanded(spec, factors, basis, conv1d)


def _lora(spec: AdapterSpec, factors: Factors, conv1d: bool) -> Form:
    stabilised = spec.method == "rslora"
    alphas = {
        layer.name: _number(layer.scale * (math.sqrt(layer.rank) if stabilised else layer.rank))
        for layer in spec.layers
    }
    settings = _lora_settings({layer.name: layer.rank for layer in spec.layers}, alphas, conv1d)
    settings |= {"use_rslora": stabilised, "use_dora": spec.method == "dora"}
    weights = {}
    for name, own in factors.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = own["A"]
        weights[f"{PREFIX}{name}.lora_B.weight"] = own["B"]
        if "m" in own:
            weights[f"{PREFIX}{name}.lora_magnitude_vector"] = own["m"]
    return settings, weights


def _expanded(spec: AdapterSpec, factors: Factors, basis: Basis, conv1d: bool) -> Form:
    """Any change L Q of low rank, as a LoRA of that rank and scale 1."""
    ranks: dict[str, int] = {}
    weights = {}
    for layer in spec.layers:
        product = METHODS[spec.method].lowrank(layer, factors[layer.name], basis)
        if product is None:
            raise AdapterError(
                f"method {spec.method!r} has no PEFT form for layer {layer.name} of shape "
                f"({layer.out}, {layer.inp}) and rank {layer.rank}; use export --format merged "
                "instead"
            )
        ranks[layer.name] = product[0].shape[1]
        weights[f"{PREFIX}{layer.name}.lora_B.weight"] = product[0]
        weights[f"{PREFIX}{layer.name}.lora_A.weight"] = product[1]
    return _lora_settings(ranks, ranks, conv1d), weights


def _lora_settings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], conv1d: bool
) -> dict[str, Any]:
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
    }


def _vera(spec: AdapterSpec, factors: Factors, basis: Basis, conv1d: bool) -> Form:
    rank = basis["shared.A"].shape[0]
    settings = {
        "peft_type": "VERA",
        "r": rank,
        "d_initial": spec.options["d_initial"],
        "vera_dropout": 0.0,
        "projection_prng_key": 0,
        "save_projection": True,
        "fan_in_fan_out": conv1d,
    }
    weights = {"base_model.vera_A": basis["shared.A"], "base_model.vera_B": basis["shared.B"]}
    for name, own in factors.items():
        # PEFT has one rank for all layers; slots beyond a layer's own are zero
        slots = torch.nn.functional.pad(own["v"], (0, rank - own["v"].shape[0]))
        weights[f"{PREFIX}{name}.vera_lambda_b"] = own["b"]
        weights[f"{PREFIX}{name}.vera_lambda_d"] = slots
    return settings, weights


def _miss(spec: AdapterSpec, factors: Factors) -> Form:
    first = spec.layers[0]
    settings = {
        **_miss_settings(first),
        "init_weights": "mini" if first.tile else True,
        "mini_r": first.tile or 1,
    }
    return settings, {f"{PREFIX}{name}.miss_block": own["D"].T for name, own in factors.items()}


def _bat(spec: AdapterSpec, factors: Factors) -> Form:
    settings = {**_miss_settings(spec.layers[0]), "init_weights": "bat"}
    return settings, {f"{PREFIX}{name}.miss_block": own["B"] for name, own in factors.items()}


def _miss_settings(layer: LayerSpec) -> dict[str, Any]:
    return {"peft_type": "MISS", "r": layer.rank, "miss_dropout": 0.0}


def _number(alpha: float) -> float:
    """`alpha` without the rounding of a root that was divided by and multiplied again."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
