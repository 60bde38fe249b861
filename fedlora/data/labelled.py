"""Encoders for classification: labelled texts and labelled pictures."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fedlora.data import unusable as reasons
from fedlora.data.encoder import malformed, text_of
from fedlora.data.example import Example
from fedlora.data.rows import Row, value_of
from fedlora.data.unusable import Unusable
from fedlora.errors import DataError, near_miss

_PICTURES_AT_ONCE = 64


def label_of(row: Row, column: str) -> str:
    """The name of the row's class; "" for null. An integer is called by its digits.

    Raises:
        DataError: the row has no label column, or something else than a string or an integer
            there; names file and line.
    """
    value = value_of(row, column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise malformed(row, column, value, "a string or an integer")
    return str(value)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Different names in order: by value when all are integers, else by spelling."""
    different = set(names)
    if all(_is_integer(name) for name in different):
        return tuple(sorted(different, key=lambda name: (int(name), name)))
    return tuple(sorted(different))


class Labels:
    """The class names in order, and the class that a row belongs to.

    Where no name is a number, rows may also give the number of the class, from 0.
    """

    def __init__(self, names: Sequence[str], column: str) -> None:
        self.names = tuple(names)
        self._column = column
        self._index = {name: place for place, name in enumerate(self.names)}
        if not any(_is_integer(name) for name in self.names):
            self._index |= {str(place): place for place in range(len(self.names))}

    def index(self, row: Row) -> int | None:
        """The number of the row's class; None for an empty label.

        Raises:
            DataError: the label is malformed or not one of the names.
        """
        label = label_of(row, self._column)
        if not label.strip():
            return None
        if label not in self._index:
            raise DataError(
                f'{row.origin}: label "{label}" is not known{near_miss(label, self.names)}; '
                f"expected one of {len(self.names)}: {', '.join(self.names[:12])}"
                f"{' ...' if len(self.names) > 12 else ''}; correct the row or set data.labels"
            )
        return self._index[label]

    def name(self, row: Row) -> str:
        """The name of the row's class; "" for an empty label."""
        place = self.index(row)
        return "" if place is None else self.names[place]


class LabelledText:
    """A text and its class; texts are cut to `max_length` tokens, special tokens included."""

    packs = False

    def __init__(self, tokenizer: Any, max_length: int, labels: Labels, *, text: str) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._labels, self._text = labels, text

    def check(self, row: Row) -> None:
        """See `Encoder`."""
        text_of(row, self._text)
        self._labels.index(row)

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        unusable = Unusable()
        used: list[tuple[Row, str, int]] = []
        for row in rows:
            text, place = text_of(row, self._text), self._labels.index(row)
            if not text.strip():
                unusable.drop(reasons.EMPTY_TEXT, row.origin)
            elif place is None:
                unusable.drop(reasons.EMPTY_LABEL, row.origin)
            else:
                used.append((row, text, place))
        examples = []
        encoded = self._tokenise([text for _, text, _ in used])
        for (row, text, place), ids in zip(used, encoded, strict=True):
            if len(ids) > self._max_length:
                unusable.cut.append(row.origin)
                ids = self._tokenise([text], truncation=True, max_length=self._max_length)[0]
            if not ids:
                unusable.drop(reasons.EMPTY_TEXT, row.origin)
                continue
            inputs = {"input_ids": torch.tensor(ids, dtype=torch.int64)}
            examples.append(Example(inputs, torch.tensor(place)))
        return examples, unusable

    def _tokenise(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, verbose=False, **options)["input_ids"]
        return ids


class LabelledImage:
    """A picture and its class; pictures are turned to RGB and processed as the model wants."""

    packs = False

    def __init__(self, image_processor: Any, labels: Labels, *, image: str) -> None:
        self._processor, self._labels, self._image = image_processor, labels, image

    def check(self, row: Row) -> None:
        """See `Encoder`."""
        value = value_of(row, self._image)
        if isinstance(value, Mapping):
            fits = isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
        else:
            fits = value is None or isinstance(value, str | bytes | Image.Image)
        if not fits:
            raise malformed(row, self._image, value, "a picture's path, bytes or decoded picture")
        self._labels.index(row)

    def encode(self, rows: Sequence[Row]) -> tuple[list[Example], Unusable]:
        """See `Encoder`."""
        unusable = Unusable()
        examples: list[Example] = []
        for start in range(0, len(rows), _PICTURES_AT_ONCE):
            pictures, places = [], []
            for row in rows[start : start + _PICTURES_AT_ONCE]:
                place = self._labels.index(row)
                if place is None:
                    unusable.drop(reasons.EMPTY_LABEL, row.origin)
                    continue
                picture = _open(value_of(row, self._image), row.folder)
                if picture is None:
                    unusable.drop(reasons.UNREADABLE_PICTURE, row.origin)
                    continue
                pictures.append(picture)
                places.append(torch.tensor(place))
            if pictures:
                pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
                examples += [
                    Example({"pixel_values": picture.float()}, place)
                    for picture, place in zip(pixels, places, strict=True)
                ]
        return examples, unusable


def _open(value: Any, folder: Path | None) -> Image.Image | None:
    # None when it cannot be read as a picture
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    try:
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, str):
            value = Image.open((folder or Path()) / value)
        return None if value is None else value.convert("RGB")
    # what pillow raises for broken files, depending on the format
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()
