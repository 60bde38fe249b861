"""Reading a data set of the Hugging Face hub."""

from typing import Any

import datasets

from fedlora.data.rows import Row, Table
from fedlora.errors import DataError
from fedlora.hub import hub_or_cache


def read_hub(name: str, subset: str | None, split: str) -> Table:
    """One split of a hub data set; class numbers become class names, pictures stay encoded.

    Args:
        name: "owner/name" or "name".
        subset: configuration name, where the data set has several.
        split: for example "train".

    Raises:
        DataError: it does not exist, cannot be reached or cannot be read.
    """
    try:
        with hub_or_cache():
            data = datasets.load_dataset(name, subset, split=split)
    # the hub client, its file readers and the network each raise errors of their own
    except Exception as e:
        raise DataError(
            f'data.source = "{name}" (subset {subset or "default"}, split {split}) could not be '
            f"loaded: it is unknown, private, or this machine is offline ({type(e).__name__}: "
            f"{_first_line(e)}); expected a hub id that can be reached, or a path that exists"
        ) from e
    if not len(data):
        raise DataError(f'data.source = "{name}": split {split} has no rows; choose another split')
    names = {}
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names[column] = feature.names
        elif isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    rows = [
        Row(_with_class_names(values, names), f"{name}[{split}]:{number}")
        for number, values in enumerate(data, 1)
    ]
    return Table(name, tuple(data.column_names), rows)


def _with_class_names(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    named = {
        # a test split without published labels has -1
        column: known[values[column]] if values[column] not in (None, -1) else None
        for column, known in names.items()
    }
    return values | named


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or ["no message"])[0][:200]
