"""Book-keeping of examples' gradients on the stacked leaves of several clients."""

from collections.abc import Collection

import torch
from torch import nn

from fedlora.adapters.stacked import StackedModel
from fedlora.privacy.pieces import Piece
from fedlora.privacy.taps import Taps


class StackedTaps(Taps):
    """Each row's gradient of what its own client holds; see `Taps`.

    Rows are ordered by client, and so are the gradients: K clients with n rows each leave K n.
    Rows that fill up a client's part have a gradient of zero, since their losses have none.

    Args:
        stacked: the model, which the context is entered inside of.
        trained: full names of what is trained; what else is stacked is left alone.
        device: of the model.
    """

    def __init__(
        self, stacked: StackedModel, trained: Collection[str], device: torch.device
    ) -> None:
        self._owned: dict[nn.Module, dict[str, str]] = {}
        for leaf, names in stacked.leaves():
            if own := {part: name for part, name in names.items() if name in trained}:
                self._owned[leaf] = own
        self._trained = trained
        super().__init__(list(self._owned), device)

    def owned(self, leaf: nn.Module) -> dict[str, str]:
        return self._owned[leaf]

    def pieces(self) -> dict[str, Piece]:
        """What the last backward pass left, for everything that is trained.

        Raises:
            TrainingError: the loss does not reach some of it.
        """
        return self.held(self._trained)
