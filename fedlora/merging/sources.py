"""The adapters to merge: folders of fedlora or of PEFT, read alike, and checked to match."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import Tensor

from fedlora.adapter import AdapterSpec, Tensors, tensors_digest
from fedlora.adapters import METHODS
from fedlora.adapters.base import Basis
from fedlora.adapters.files import load_adapter
from fedlora.adapters.foreign import import_peft
from fedlora.errors import AdapterError
from fedlora.linalg import Pair
from fedlora.models.assemble import find_adapter
from fedlora.models.export import PEFT_TASKS


@dataclass(frozen=True)
class Source:
    """One adapter.

    Attributes:
        name: as the user called it.
        spec: the adapter; base_fingerprint is "" where it is not known.
        tensors: factors and heads.
        basis: frozen tensors of the adapter.
        base_model: name or path of the base; "" where it is not known.
        task_type: PEFT's name of the task, if any.
        labels: class names, where they are known.
        conv1d: the base stores weights as (in, out), as far as the folder says.
        changes: layer -> weight change as (L (d, r), Q (r, k)), float64, of scale 1.
    """

    name: str
    spec: AdapterSpec
    tensors: Tensors
    basis: Basis
    base_model: str
    task_type: str | None
    labels: tuple[str, ...]
    conv1d: bool
    changes: dict[str, Pair]

    @property
    def heads(self) -> dict[str, Tensor]:
        """Parameters of the fully trained modules, by full name."""
        return {name: self.tensors[name] for name in self.spec.head_shapes}


def read_source(path: Path) -> Source:
    """The adapter in a run folder, an adapter folder or a folder that PEFT saved.

    Raises:
        AdapterError: missing, damaged, or a change that is not known without the base.
    """
    folder = find_adapter(path)
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise AdapterError(f"{folder}/adapter_config.json is not readable: {e}") from e
    tensors: Tensors
    basis: Basis = {}
    labels: tuple[str, ...] = ()
    if isinstance(config, dict) and "peft_type" in config:
        spec, tensors = import_peft(folder)
        base, task_type = config.get("base_model_name_or_path"), config.get("task_type")
        conv1d = bool(config.get("fan_in_fan_out"))
    else:
        adapter = load_adapter(folder)
        spec, tensors, labels = adapter.spec, adapter.tensors, adapter.labels
        basis = adapter.basis or _seeded_basis(spec, folder)
        base, task_type, conv1d = adapter.base_model, PEFT_TASKS.get(adapter.task), False
    return Source(
        name=str(path),
        spec=spec,
        tensors=tensors,
        basis=basis,
        base_model=str(base or ""),
        task_type=str(task_type) if task_type else None,
        labels=labels,
        conv1d=conv1d,
        changes=_changes(path, spec, tensors, basis),
    )


def check_match(sources: Sequence[Source], model: str | None) -> None:
    """Raises AdapterError unless all adapters have one base, one set of layers and equal heads.

    Args:
        sources: at least one.
        model: the base that the user says they all stand on; names are then not compared.
    """
    for one, other in combinations(sources, 2):
        _check_base(one, other, model)
    first = sources[0]
    for other in sources[1:]:
        mine, theirs = ({layer.name: layer for layer in s.spec.layers} for s in (first, other))
        if odd := sorted(mine.keys() ^ theirs.keys()):
            holder = first if odd[0] in mine else other
            raise AdapterError(
                f"{first.name} and {other.name} adapt different layers: {', '.join(odd[:4])} "
                f"({len(odd)} in all) in only one, the first in {holder.name}; merge adapters "
                "with the same targets"
            )
        for name, layer in mine.items():
            found = theirs[name]
            if (layer.out, layer.inp) != (found.out, found.inp):
                raise AdapterError(
                    f"layer {name} is ({layer.out}, {layer.inp}) in {first.name} and "
                    f"({found.out}, {found.inp}) in {other.name}; merge adapters of one base"
                )
        _check_heads(first, other)


def _check_base(first: Source, other: Source, model: str | None) -> None:
    prints = first.spec.base_fingerprint, other.spec.base_fingerprint
    if all(prints):
        if prints[0] != prints[1]:
            raise AdapterError(
                f"{first.name} stands on {first.base_model} (fingerprint {prints[0][:12]}), "
                f"{other.name} on {other.base_model} ({prints[1][:12]}); merge adapters of one base"
            )
        return
    names = first.base_model, other.base_model
    if model is None and all(names) and names[0] != names[1]:
        raise AdapterError(
            f"{first.name} was trained on {names[0]!r}, {other.name} on {names[1]!r}; merge "
            "adapters of one base, or say with --model which one these names stand for"
        )


def _check_heads(first: Source, other: Source) -> None:
    shapes = [{k: tuple(v.shape) for k, v in source.heads.items()} for source in (first, other)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        mine, theirs = (found.get(name, "missing") for found in shapes)
        if mine != theirs:
            raise AdapterError(
                f"the fully trained {name} is {mine} in {first.name} and {theirs} in "
                f"{other.name}; heads are averaged, so every adapter must have the same ones"
            )
    if first.labels and other.labels and first.labels != other.labels:
        raise AdapterError(
            f"{first.name} has the classes {', '.join(first.labels)}, {other.name} "
            f"{', '.join(other.labels)}; merge adapters with the same classes in the same order"
        )


def _changes(path: Path, spec: AdapterSpec, tensors: Tensors, basis: Basis) -> dict[str, Pair]:
    method = METHODS[spec.method]
    changes = {}
    for layer in spec.layers:
        factors = {
            factor: tensors[f"{layer.name}.{factor}"].double()
            for factor in method.factor_shapes(layer)
        }
        product = method.lowrank(layer, factors, basis)
        if product is None:
            why = "its magnitudes rescale" if spec.method == "dora" else "it depends on"
            raise AdapterError(
                f"{path} is a {spec.method} adapter: {why} the base weight of layer {layer.name}, "
                "so its change is not known without the base; only additive low-rank adapters "
                "are merged"
            )
        changes[layer.name] = (product[0].double(), product[1].double())
    return changes


def _seeded_basis(spec: AdapterSpec, folder: Path) -> Basis:
    method = METHODS[spec.method]
    if method.basis_provenance != "seed":
        return {}

    def no_weight(name: str) -> Tensor:
        raise AssertionError(f"a basis made of a seed needs no weight of {name}")

    basis = method.make_basis(spec.layers, no_weight, spec.seed, spec.options)
    if tensors_digest(basis) != spec.basis_digest:
        raise AdapterError(
            f"{folder}: the frozen basis made of seed {spec.seed} is not the one that the adapter "
            "was trained with; merge it on the kind of machine that trained it"
        )
    return basis
