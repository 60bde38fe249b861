"""Encoder for conversations; the loss counts what the assistant says."""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from fedlora.data import unusable as reasons
from fedlora.data.encoder import check_text, malformed
from fedlora.data.example import IGNORE, Example
from fedlora.data.rows import Row, value_of
from fedlora.data.tokens import token_bytes, tokenise
from fedlora.data.unusable import Unusable
from fedlora.errors import DataError

Message = dict[str, str]


class Chat:
    """A list of messages, put in the tokenizer's chat template.

    An assistant's turn is what the template adds for it: the conversation with the turn minus
    the conversation before it that asks for the turn. Line breaks that a template puts behind
    the end token are not counted. Messages after the last assistant's turn are left out.
    """

    packs = False

    def __init__(self, tokenizer: Any, max_length: int, *, messages: str) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                'data.format = "chat" needs a chat template, and this tokenizer has none; choose '
                "an instruction-tuned model, or prompt and completion columns instead"
            )
        self._tokenizer, self._max_length, self._column = tokenizer, max_length, messages
        self._bytes = token_bytes(tokenizer)
        self._end = tokenizer.eos_token_id

    def check(self, row: Row) -> None:
        """See `Encoder`."""
        self._messages(row)

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        unusable = Unusable()
        used: list[tuple[Row, list[tuple[str, str]]]] = []
        for row in rows:
            if turns := self._turns(row):
                used.append((row, turns))
            else:
                unusable.drop(reasons.NO_ASSISTANT, row.origin)
        texts = [text for _, turns in used for turn in turns for text in turn]
        tokens = iter(tokenise(self._tokenizer, texts))
        examples = []
        for row, turns in used:
            pairs = [(next(tokens), next(tokens)) for _ in turns]
            whole = pairs[-1][1]
            input_ids = torch.tensor(whole[: self._max_length], dtype=torch.int64)
            target = torch.full_like(input_ids, IGNORE)
            for before, until in pairs:
                start, end = self._span(before, until, whole)
                target[start:end] = input_ids[start:end]
            counted = target[target != IGNORE]
            if not len(counted):
                unusable.drop(reasons.NO_COMPLETION_LEFT, row.origin)
                continue
            if len(whole) > self._max_length:
                unusable.cut.append(row.origin)
            num_bytes = int(self._bytes[counted].sum())
            examples.append(Example({"input_ids": input_ids}, target, num_bytes))
        return examples, unusable

    def _messages(self, row: Row) -> list[Message]:
        value = value_of(row, self._column)
        if value is None:
            return []
        if not isinstance(value, list):
            raise malformed(row, self._column, value, "a list of {role, content}")
        for number, message in enumerate(value, 1):
            where = f"{self._column}[{number}]"
            if not isinstance(message, dict):
                raise malformed(row, where, message, "an object with role and content")
            for key in ("role", "content"):
                check_text(row, f"{where}.{key}", message.get(key))
        return [{"role": message["role"], "content": message["content"]} for message in value]

    def _turns(self, row: Row) -> list[tuple[str, str]]:
        # for each assistant's turn the text before it and the text up to its end
        messages = self._messages(row)
        turns = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            until = self._render(row, messages[: place + 1], ask=False)
            before = self._before(row, messages[:place], until)
            turns.append((before, until))
        whole = turns[-1][1] if turns else ""
        for _, until in turns:
            if not whole.startswith(until):
                raise self._not_a_prefix(row)
        return turns

    def _before(self, row: Row, messages: list[Message], until: str) -> str:
        if not messages:
            return ""
        for ask in (True, False):
            before = self._render(row, messages, ask=ask)
            if until.startswith(before):
                return before
        raise self._not_a_prefix(row)

    def _render(self, row: Row, messages: list[Message], *, ask: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, ValueError, TypeError, KeyError) as e:
            raise DataError(
                f'{row.origin}: the chat template refuses column "{self._column}" ({e}); '
                "expected roles in the order that the model's template allows; correct the row"
            ) from e
        return text

    def _not_a_prefix(self, row: Row) -> DataError:
        return DataError(
            f"{row.origin}: the chat template writes earlier messages differently once a turn "
            "follows, so the assistant's turns cannot be told apart; expected each conversation "
            "to begin with the shorter one; split the row into one conversation per turn, or use "
            "prompt and completion columns"
        )

    def _span(self, before: list[int], until: list[int], whole: list[int]) -> tuple[int, int]:
        # a token may reach over the border of two texts; then the border is before it
        start, end = _shared(before, whole), _shared(until, whole)
        ends = [place for place in range(start, end) if whole[place] == self._end]
        return max(start, 1), ends[-1] + 1 if ends else end


def _shared(left: list[int], right: list[int]) -> int:
    # length of the common beginning
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
