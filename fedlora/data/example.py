"""Example and Batch: what the model is trained on, one piece and several stacked.

Shapes: n examples, T tokens, C H W channels, height and width of a picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that the loss does not count."""


@dataclass(frozen=True)
class Example:
    """One tokenised text or processed picture with its target.

    Attributes:
        inputs: "input_ids" (T,) int64, or "pixel_values" (C, H, W) float32.
        target: a class () int64, or next-token labels (T,) int64 in transformers' convention:
            at the same positions as input_ids, IGNORE where the loss does not count. The first
            position is always IGNORE, because nothing predicts it; so the number of counted
            tokens is the number of targets that are not IGNORE.
        num_bytes: UTF-8 bytes of the counted target text, for bits per byte; 0 for a class.
        answer: the whole completion of prompt-and-completion data, to compare a generated text
            with; None for all other data.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    num_bytes: int = 0
    answer: str | None = None

    @property
    def prompt_ids(self) -> Tensor:
        """The tokens before the first counted one, (T',) int64; what generation starts from."""
        counted = (self.target != IGNORE).nonzero()
        end = int(counted[0]) if len(counted) else len(self.target)
        return self.inputs["input_ids"][:end]


@dataclass(frozen=True)
class Batch:
    """Examples stacked and padded.

    Attributes:
        inputs: keyword arguments of the model: "input_ids" and "attention_mask" (n, T) int64,
            or "pixel_values" (n, C, H, W) float32.
        target: (n, T) or (n,) int64.
    """

    inputs: dict[str, Tensor]
    target: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = {name: _moved(tensor, device) for name, tensor in self.inputs.items()}
        return Batch(moved, _moved(self.target, device))


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On a GPU by way of pinned memory, so that the processor does not wait for the copy."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack at least one example; texts are padded on the right to the longest.

    Args:
        examples: all texts, or all pictures of one shape.
        pad_id: token that fills up input_ids; targets fill up with IGNORE.
    """
    first = examples[0]
    if "pixel_values" in first.inputs:
        pixels = torch.stack([example.inputs["pixel_values"] for example in examples])
        return Batch({"pixel_values": pixels}, torch.stack([e.target for e in examples]))
    ids = [example.inputs["input_ids"] for example in examples]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in ids])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    targets = [example.target for example in examples]
    if first.target.ndim == 0:
        target = torch.stack(targets)
    else:
        target = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    return Batch({"input_ids": input_ids, "attention_mask": attention_mask}, target)
