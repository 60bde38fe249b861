"""AdaptedModel: a transformers model with adapters in place of its linear layers."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedlora.adapter import AdapterSpec, AdapterState, Tensors, tensors_digest
from fedlora.adapters import METHODS
from fedlora.adapters.base import AdapterLayer, Basis, Method
from fedlora.adapters.siblings import join_siblings
from fedlora.adapters.targets import (
    find_targets,
    linear_layers,
    linear_shape,
    linear_weight,
    tied_to,
)
from fedlora.errors import AdapterError, ConfigError


class AdaptedModel:
    """A model, its adapter layers and its trained heads.

    The model object is changed in place. Everything but factors and heads is frozen.
    Use `adapt` or `AdaptedModel.from_spec` to make one.
    """

    def __init__(
        self, model: nn.Module, spec: AdapterSpec, basis: Basis, dropout: float = 0.0
    ) -> None:
        self.model = model
        self.method: Method = METHODS[spec.method]
        self.spec = spec
        self.basis = basis
        self.dropout = dropout
        self.layers: dict[str, AdapterLayer] = {}
        model.requires_grad_(False)
        for head in spec.heads:
            model.get_submodule(head).requires_grad_(True)
        self._attach()

    @classmethod
    def from_spec(
        cls,
        model: nn.Module,
        spec: AdapterSpec,
        base_fingerprint: str,
        basis: Basis | None = None,
        dropout: float = 0.0,
    ) -> "AdaptedModel":
        """Attaches the adapter that `spec` describes to its own base.

        Args:
            base_fingerprint: fingerprint of `model` as loaded.
            basis: frozen tensors as sent by the server; None makes them here.

        Raises:
            AdapterError: another base, other layers, or a basis with another digest.
        """
        if spec.method not in METHODS:
            raise AdapterError(
                f"adapter method {spec.method!r} is not known; known: {', '.join(METHODS)}"
            )
        if spec.base_fingerprint != base_fingerprint:
            raise AdapterError(
                f"the adapter was trained on base {spec.base_fingerprint[:12]}, this model is "
                f"{base_fingerprint[:12]}; load the base model it was trained on"
            )
        linears = dict(linear_layers(model))
        for layer in spec.layers:
            found = linears.get(layer.name)
            if found is None or linear_shape(found) != (layer.out, layer.inp):
                shape = linear_shape(found) if found is not None else "no linear layer"
                raise AdapterError(
                    f"layer {layer.name}: the adapter expects ({layer.out}, {layer.inp}), "
                    f"the model has {shape}"
                )
        known = dict(model.named_modules())
        shapes = head_shapes(model, [head for head in spec.heads if head in known])
        if set(spec.heads) - set(known) or shapes != spec.head_shapes:
            raise AdapterError(
                f"the adapter trains the heads {dict(spec.head_shapes)}; the model has {shapes}"
            )
        if basis is None:
            method = METHODS[spec.method]
            basis = method.make_basis(
                spec.layers, lambda name: linear_weight(linears[name]), spec.seed, spec.options
            )
        if tensors_digest(basis) != spec.basis_digest:
            raise AdapterError(
                f"the frozen basis has digest {tensors_digest(basis)[:12]}, the adapter was made "
                f"with {spec.basis_digest[:12]}; take the basis from the server that made it"
            )
        return cls(model, spec, basis, dropout)

    def _attach(self) -> None:
        for layer in self.spec.layers:
            module = self.model.get_submodule(layer.name)
            base = module
            if isinstance(module, AdapterLayer):
                module.unmerge()
                base = module.base
            adapted = self.method.attach(
                base,
                layer,
                self.basis,
                seed=self.spec.seed,
                dropout=self.dropout,
                options=self.spec.options,
            )
            adapted.train(base.training)
            if isinstance(module, AdapterLayer):
                adapted.disabled = module.disabled
            parent, _, child = layer.name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, adapted)
            self.layers[layer.name] = adapted
        join_siblings(self.layers)

    def rerank(self, spec: AdapterSpec) -> None:
        """Gives every layer the rank that `spec` (same layers) says; factors start anew.

        The method may change as well, e.g. to a LoRA that holds a product and its folds.
        """
        if spec != self.spec:
            self.spec = spec
            self.method = METHODS[spec.method]
            self._attach()

    def fold(self, versions: Iterable[Tensors]) -> None:
        """Changes the base to W0 + sum L Q; without versions it is W0 again.

        Args:
            versions: layer + ".L" (d, rho) and layer + ".Q" (rho, k) of every layer.
        """
        versions = list(versions)
        for name, layer in self.layers.items():
            if not versions:
                layer.fold = ()
                continue
            layer.set_fold(
                torch.cat([version[f"{name}.L"] for version in versions], 1),
                torch.cat([version[f"{name}.Q"] for version in versions], 0),
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every factor and head parameter by full name, sorted."""
        named = {
            f"{name}.{factor}": parameter
            for name, layer in self.layers.items()
            for factor, parameter in layer.factors().items()
        }
        for head in self.spec.heads:
            for name, parameter in self.model.get_submodule(head).named_parameters():
                named[f"{head}.{name}"] = parameter
        return dict(sorted(named.items()))

    def state(self) -> AdapterState:
        """A copy of every factor and head parameter, on the CPU."""
        tensors = {k: v.detach().to("cpu", copy=True) for k, v in self.parameters().items()}
        return AdapterState(self.spec, tensors)

    def load(self, tensors: Tensors) -> None:
        """Copies the named tensors in; names that are not given keep their values.

        Raises:
            AdapterError: an unknown name or another shape.
        """
        parameters = self.parameters()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in parameters:
                    raise AdapterError(f"{name} is not a tensor of this {self.spec.method} adapter")
                if parameters[name].shape != tensor.shape:
                    raise AdapterError(
                        f"{name} has shape {tuple(tensor.shape)}; expected "
                        f"{tuple(parameters[name].shape)}"
                    )
                parameters[name].copy_(tensor)

    def train_only(self, factors: Iterable[str]) -> dict[str, nn.Parameter]:
        """Makes the named factors and the heads trainable, freezes the rest, returns them."""
        wanted = set(factors)
        trained: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            for factor, parameter in layer.factors().items():
                parameter.requires_grad_(factor in wanted)
                parameter.grad = None
                if factor in wanted:
                    trained[f"{name}.{factor}"] = parameter
        for head in self.spec.heads:
            for name, parameter in self.model.get_submodule(head).named_parameters():
                parameter.grad = None
                trained[f"{head}.{name}"] = parameter
        return dict(sorted(trained.items()))

    def key_dropout(self, *keys: int, room: int = 0) -> None:
        """Sets what the next forward pass drops of adapters' inputs (see `KeyedDropout`).

        Args:
            keys: of each client of the pass; from 0 to below 2**63.
            room: rows of every client, if there are several.
        """
        if not self.dropout:
            return
        device = next(self.model.parameters()).device
        held = torch.tensor(keys, dtype=torch.int64).to(device, non_blocking=True)
        for layer in self.layers.values():
            layer.dropout.keys, layer.dropout.room = held, room

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, the model computes as if it had no adapter (heads stay)."""
        for layer in self.layers.values():
            layer.disabled = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.disabled = False

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the base weights contain the change; afterwards W0 is back, bit for bit.

        Raises:
            AdapterError: a base weight is tied to another one, which would change too.
        """
        for name, layer in self.layers.items():
            if others := tied_to(self.model, layer.stored_weight, f"{name}."):
                raise AdapterError(
                    f"the weight of layer {name} is tied to {others[0]}, so it cannot be merged "
                    "alone; save the adapter unmerged, or untie the weights"
                )
        try:
            for layer in self.layers.values():
                layer.merge()
            yield
        finally:
            for layer in self.layers.values():
                layer.unmerge()

    def detach(self) -> nn.Module:
        """The plain model with its own linear layers back in place (merged if they were)."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base)
        self.layers = {}
        return self.model


def adapt(
    model: nn.Module,
    *,
    method: str,
    rank: int,
    alpha: float | None,
    targets: Sequence[str] | str,
    heads: Sequence[str],
    base_fingerprint: str,
    seed: int,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """A fresh adapter on `model`.

    Args:
        targets: names, name endings or regular expressions of linear layers, or "all-linear".
        heads: modules trained in full.
        base_fingerprint: fingerprint of the frozen weights.
        seed: the run's seed.

    Raises:
        ConfigError: a target or head that matches nothing, or a rank that does not fit.
    """
    chosen = METHODS[method]
    checked = chosen.check_options(options or {})
    for head in heads:
        if head not in dict(model.named_modules()):
            raise ConfigError(
                f"adapter.heads names {head!r}, which the model does not have; "
                f"its top modules are {', '.join(name for name, _ in model.named_children())}"
            )
        for parameter in model.get_submodule(head).parameters():
            if others := tied_to(model, parameter, f"{head}."):
                raise ConfigError(
                    f"adapter.heads names {head!r}, whose weight is tied to {others[0]}, a frozen "
                    "weight; leave the head out or untie the weights (tie_word_embeddings)"
                )
    linears = find_targets(model, targets, heads)
    shapes = {name: linear_shape(module) for name, module in linears.items()}
    strength = alpha if alpha is not None else chosen.default_alpha(rank)
    layers = chosen.plan(shapes, rank, strength, checked)
    basis = chosen.make_basis(layers, lambda name: linear_weight(linears[name]), seed, checked)
    spec = AdapterSpec(
        method=method,
        rank=rank,
        alpha=float(strength),
        layers=layers,
        heads=tuple(heads),
        head_shapes=head_shapes(model, heads),
        base_fingerprint=base_fingerprint,
        seed=seed,
        options=checked,
    )
    spec = dataclasses.replace(spec, basis_digest=tensors_digest(basis))
    return AdaptedModel(model, spec, basis, dropout)


def head_shapes(model: nn.Module, heads: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the heads, by full name."""
    return {
        f"{head}.{name}": tuple(parameter.shape)
        for head in heads
        for name, parameter in model.get_submodule(head).named_parameters()
    }
