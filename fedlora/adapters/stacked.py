"""StackedModel: the adapters of several clients on one base, for one forward pass over all.

Every trained parameter sits in a leaf (see `leaves`), so it is enough to put in the place of
each leaf one that holds the values of K clients and takes rows that are ordered by client:
dimension 0 of every activation is K n, client after client. Everything else of the model is
shared, and what it computes for a row depends on that row alone.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from fedlora.adapters.inject import AdaptedModel
from fedlora.adapters.leaves import BlockDiagLinear, DiagScale
from fedlora.adapters.stacked_leaves import (
    StackedBlocks,
    StackedLeaf,
    StackedLinear,
    StackedScale,
)

_STACKED: Mapping[type[nn.Module], type[StackedLeaf]] = {
    nn.Linear: StackedLinear,
    DiagScale: StackedScale,
    BlockDiagLinear: StackedBlocks,
}


class StackedModel:
    """A context in which an adapted model computes with the factors and heads of K clients.

    Args:
        adapted: the model; its own factors are untouched, and back afterwards.
        names: full names of the tensors that differ between clients.

    The model must be one without an `obstacle`.
    """

    def __init__(self, adapted: AdaptedModel, names: Iterable[str]) -> None:
        self.adapted = adapted
        # leaf's path in the model -> (its replacement, parameter -> full name)
        self._places: dict[str, tuple[StackedLeaf, dict[str, str]]] = {}
        for name in sorted(names):
            path, parameter = _leaf_of(adapted, name)
            leaf = _STACKED[type(adapted.model.get_submodule(path))]()
            self._places.setdefault(path, (leaf, {}))[1][parameter] = name
        self._originals: dict[str, nn.Module] = {}

    def __enter__(self) -> "StackedModel":
        for path, (leaf, _) in self._places.items():
            original = self.adapted.model.get_submodule(path)
            self._originals[path] = original
            _put(self.adapted.model, path, leaf)
        return self

    def __exit__(self, *args: object) -> None:
        for path, module in self._originals.items():
            _put(self.adapted.model, path, module)
        self._originals = {}

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Computes with these values from now on.

        Args:
            values: name -> (c, *shape) of as many clients as the next rows are of.
        """
        for leaf, parameters in self._places.values():
            leaf.weight = values[parameters["weight"]]
            if "bias" in parameters:
                leaf.bias = values[parameters["bias"]]

    def leaves(self) -> Iterator[tuple[StackedLeaf, Mapping[str, str]]]:
        """Every stacked leaf, and "weight" or "bias" -> full name of what it holds."""
        yield from self._places.values()


def obstacle(adapted: AdaptedModel) -> str:
    """Why adapters of several clients cannot share a forward pass; empty if they can."""
    for name, layer in adapted.layers.items():
        for factor in layer.factors():
            leaf = type(getattr(layer, factor))
            if leaf not in _STACKED:
                return (
                    f"method {adapted.spec.method!r} makes a matrix of the size of layer {name} "
                    "for every client"
                )
    for head in adapted.spec.heads:
        for path, module in adapted.model.get_submodule(head).named_modules(prefix=head):
            if list(module.parameters(recurse=False)) and type(module) is not nn.Linear:
                return f"the trained head {path} is a {type(module).__name__}, not a linear layer"
    return ""


def _leaf_of(adapted: AdaptedModel, name: str) -> tuple[str, str]:
    """(path of the leaf, name of its parameter) of a factor or of a head's parameter."""
    layer, _, last = name.rpartition(".")
    return (name, "weight") if layer in adapted.layers else (layer, last)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, module)
