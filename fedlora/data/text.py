"""Encoders for language models: plain text, and prompt with completion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.data import unusable as reasons
from fedlora.data.encoder import text_of
from fedlora.data.example import IGNORE, Example
from fedlora.data.rows import Row
from fedlora.data.tokens import prefix_ids, token_bytes, tokenise
from fedlora.data.unusable import Unusable
from fedlora.errors import DataError


def end_token(tokenizer: Any, what: str) -> int:
    """The tokenizer's end-of-text token.

    Raises:
        DataError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer has no end-of-text token, which {what} needs; "
            "choose a model whose tokenizer sets eos_token"
        )
    return int(tokenizer.eos_token_id)


def causal_example(
    ids: Sequence[int], first_counted: int, bytes_of: Tensor, answer: str | None = None
) -> Example:
    """An example whose loss counts the tokens from `first_counted` (at least 1) to the end."""
    input_ids = torch.tensor(ids, dtype=torch.int64)
    target = input_ids.clone()
    target[: max(first_counted, 1)] = IGNORE
    num_bytes = int(bytes_of[target[target != IGNORE]].sum())
    return Example({"input_ids": input_ids}, target, num_bytes, answer)


class PlainText:
    """Text whose every token counts, one example per document, cut to `max_length`."""

    packs = False

    def __init__(self, tokenizer: Any, max_length: int, *, text: str) -> None:
        self._tokenizer, self._max_length, self._text = tokenizer, max_length, text
        self._prefix = prefix_ids(tokenizer)
        self._bytes = token_bytes(tokenizer)
        self._end = end_token(tokenizer, "plain text")

    def check(self, row: Row) -> None:
        """See `Encoder`."""
        text_of(row, self._text)

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        examples, unusable = [], Unusable()
        for row, ids in self._documents(rows, unusable):
            if len(ids) > self._max_length:
                unusable.cut.append(row.origin)
                ids = ids[: self._max_length]
            if len(ids) < 2:
                unusable.drop(reasons.TOO_SHORT, row.origin)
                continue
            examples.append(causal_example(ids, 1, self._bytes))
        return examples, unusable

    def _documents(self, rows: Sequence[Row], unusable: Unusable) -> list[tuple[Row, list[int]]]:
        # each with the tokenizer's start token, if any, and the end token
        filled = []
        for row in rows:
            if (text := text_of(row, self._text)).strip():
                filled.append((row, text))
            else:
                unusable.drop(reasons.EMPTY_TEXT, row.origin)
        ids = tokenise(self._tokenizer, [text for _, text in filled])
        return [
            (row, [*self._prefix, *tokens, self._end])
            for (row, _), tokens in zip(filled, ids, strict=True)
        ]


class PackedText(PlainText):
    """Text whose every token counts, documents joined and cut into blocks of `max_length`.

    Each document ends with the end token. No token is lost but a last block of one token, which
    has nothing to predict.
    """

    packs = True

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        unusable = Unusable()
        documents = [np.array(tokens, np.int64) for _, tokens in self._documents(rows, unusable)]
        if not documents:
            return [], unusable
        # all blocks in one go: one by one this would take longer than the tokenizer
        ids = torch.from_numpy(np.concatenate(documents))
        target = ids.clone()
        target[:: self._max_length] = IGNORE
        sizes = self._bytes[ids]
        sizes[:: self._max_length] = 0
        examples = [
            Example({"input_ids": block}, block_target, int(block_sizes.sum()))
            for block, block_target, block_sizes in zip(
                torch.split(ids, self._max_length),
                torch.split(target, self._max_length),
                torch.split(sizes, self._max_length),
                strict=True,
            )
            if len(block) >= 2
        ]
        return examples, unusable


class Completion:
    """A prompt and its completion; the loss counts the completion and the end token.

    The two are tokenised apart and joined without anything between them, so a generated text
    continues the prompt from the same tokens as in training.
    """

    packs = False

    def __init__(self, tokenizer: Any, max_length: int, *, prompt: str, completion: str) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._prompt, self._completion = prompt, completion
        self._prefix = prefix_ids(tokenizer)
        self._bytes = token_bytes(tokenizer)
        self._end = end_token(tokenizer, "prompt and completion")

    def check(self, row: Row) -> None:
        """See `Encoder`."""
        text_of(row, self._prompt)
        text_of(row, self._completion)

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        examples, unusable = [], Unusable()
        answers = [text_of(row, self._completion) for row in rows]
        prompts = tokenise(self._tokenizer, [text_of(row, self._prompt) for row in rows])
        completions = tokenise(self._tokenizer, answers)
        for row, prompt, completion, answer in zip(
            rows, prompts, completions, answers, strict=True
        ):
            start = len(self._prefix) + len(prompt)
            ids = [*self._prefix, *prompt, *completion, self._end]
            if not answer.strip() or not completion:
                unusable.drop(reasons.EMPTY_COMPLETION, row.origin)
            elif not start:
                unusable.drop(reasons.EMPTY_PROMPT, row.origin)
            elif start >= self._max_length:
                unusable.drop(reasons.NO_COMPLETION_LEFT, row.origin)
            else:
                if len(ids) > self._max_length:
                    unusable.cut.append(row.origin)
                ids = ids[: self._max_length]
                examples.append(causal_example(ids, start, self._bytes, answer))
        return examples, unusable
