"""Made-up examples: to try a model without reading, and so spending, anybody's data."""

import torch

from fedlora.adapters.inject import AdaptedModel
from fedlora.data.example import IGNORE, Example
from fedlora.seeds import generator


def made_up(adapted: AdaptedModel, like: Example, number: int, length: int) -> Example:
    """A random example of the same kind as another one.

    Args:
        adapted: the model, whose vocabulary and classes are used.
        like: gives the kind, and the size of a picture; nothing of its content is used.
        number: of the example; the same number gives the same one.
        length: of a text, in tokens, at least 2.
    """
    stream = generator(number, "made-up example")
    config = adapted.model.config
    if like.target.ndim == 0:
        target = torch.tensor(number % int(config.num_labels))  # type: ignore[union-attr, arg-type]
    if "pixel_values" in like.inputs:
        return Example(
            {"pixel_values": torch.randn(like.inputs["pixel_values"].shape, generator=stream)},
            target,
        )
    vocabulary = int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(0, vocabulary, (length,), generator=stream)
    if like.target.ndim == 1:
        target = ids.clone()
        target[0] = IGNORE
    return Example({"input_ids": ids}, target)
