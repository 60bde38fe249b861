"""Which format the rows of a job have, and the encoder for it."""

from typing import Any

from fedlora.config.job import DataSection
from fedlora.data.chat import Chat
from fedlora.data.encoder import Encoder
from fedlora.data.labelled import LabelledImage, LabelledText, Labels, label_of, sorted_names
from fedlora.data.rows import Table
from fedlora.data.text import Completion, PackedText, PlainText
from fedlora.errors import ConfigError, DataError, near_miss

TASK_FORMATS = {
    "causal-lm": ("text", "completion", "chat"),
    "sequence-classification": ("labelled-text",),
    "image-classification": ("labelled-image",),
}


def resolve_format(data: DataSection, task: str, table: Table) -> str:
    """The format of the rows: data.format, or what "auto" means for this task and table.

    Raises:
        ConfigError: data.format does not go with the task.
        DataError: the table lacks a column of the format; the message lists those it has.
    """
    known = TASK_FORMATS[task]
    form: str = data.format
    if form == "auto":
        form = known[0]
        if task == "causal-lm":
            if data.messages in table.columns:
                form = "chat"
            elif data.prompt in table.columns and data.completion in table.columns:
                form = "completion"
            elif data.text not in table.columns:
                raise DataError(
                    f'{table.name} has no column "{data.messages}", no "{data.prompt}" with '
                    f'"{data.completion}", and no "{data.text}"'
                    f"{near_miss(data.text, table.columns)}; columns: {table.column_list}; "
                    "set data.messages, data.prompt and data.completion, or data.text"
                )
    if form not in known:
        raise ConfigError(
            f'data.format = "{form}" does not go with model.task = "{task}"; expected '
            f"{' or '.join(known)}"
        )
    needed = {
        "text": ("text",),
        "completion": ("prompt", "completion"),
        "chat": ("messages",),
        "labelled-text": ("text", "label"),
        "labelled-image": ("image", "label"),
    }[form]
    for setting in needed:
        table.require(getattr(data, setting), f"data.{setting}")
    return form


def find_labels(data: DataSection, table: Table) -> Labels:
    """The class names: data.labels, or all that the table has, sorted.

    Raises:
        ConfigError: data.labels names a class twice.
        DataError: a label is malformed, or all are empty.
    """
    if data.labels:
        if len(set(data.labels)) < len(data.labels):
            raise ConfigError(f"data.labels names a class twice: {data.labels}; name each once")
        return Labels(data.labels, data.label)
    names = sorted_names(
        label for row in table.rows if (label := label_of(row, data.label)).strip()
    )
    if not names:
        raise DataError(
            f'{table.name}: column "{data.label}" is empty in every row; expected class names; '
            "set data.label to another column"
        )
    return Labels(names, data.label)


def build_encoder(
    data: DataSection, form: str, labels: Labels | None, *, tokenizer: Any, image_processor: Any
) -> Encoder:
    """The encoder of a resolved format.

    Raises:
        ConfigError: data.max_length leaves nothing to predict.
        DataError: the tokenizer lacks what the format needs.
    """
    if form == "labelled-image":
        assert labels is not None
        assert image_processor is not None, "pictures need an image processor"
        return LabelledImage(image_processor, labels, image=data.image)
    assert tokenizer is not None, "texts need a tokenizer"
    if form == "labelled-text":
        assert labels is not None
        return LabelledText(tokenizer, data.max_length, labels, text=data.text)
    if data.max_length < 2:
        raise ConfigError(
            f"data.max_length = {data.max_length} leaves nothing to predict; choose at least 2"
        )
    if form == "chat":
        return Chat(tokenizer, data.max_length, messages=data.messages)
    if form == "completion":
        return Completion(
            tokenizer, data.max_length, prompt=data.prompt, completion=data.completion
        )
    kind = PackedText if data.packed else PlainText
    return kind(tokenizer, data.max_length, text=data.text)
