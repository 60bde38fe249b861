"""Reading the source that a job names, whatever it is."""

from pathlib import Path

from fedlora.data.files import TABLE_SUFFIXES, read_file
from fedlora.data.folders import read_client_folders, read_folder
from fedlora.data.hub import read_hub
from fedlora.data.rows import Row, Table
from fedlora.data.stdlib import federated_files
from fedlora.errors import DataError, near_miss

BUILTIN = "builtin:stdlib"
# every client brings its own data
CLIENTS = "clients"


def read_source(
    source: str,
    *,
    client_folders: bool,
    subset: str | None = None,
    split: str = "train",
    text: str = "text",
    image: str = "image",
    label: str = "label",
    numbered: frozenset[str] = frozenset(),
) -> Table:
    """Every row of a source.

    Args:
        source: "builtin:stdlib" (columns `text` and "area"), the path of a file or folder, or
            a hub id.
        client_folders: the source is a folder with one sub-folder per client.
        subset: configuration name of a hub data set.
        split: split of a hub data set.
        text: what the column of .txt files and of the builtin data is called.
        image: what the column of pictures in class folders is called.
        label: what the column of their class is called.
        numbered: columns that the job names by number, as files without header need.

    Raises:
        DataError: the source does not exist, cannot be read, or has a malformed row.
    """
    path = Path(source).expanduser()
    if client_folders:
        return read_client_folders(path, text=text, image=image, label=label, numbered=numbered)
    if source.startswith("builtin:"):
        return _read_builtin(source, text)
    if path.is_dir():
        return read_folder(path, text=text, image=image, label=label, numbered=numbered)
    if path.exists():
        return read_file(path, numbered=numbered)
    if path.is_absolute() or path.suffix.lower() in TABLE_SUFFIXES or source.startswith((".", "~")):
        raise DataError(
            f'"{source}" does not exist{_neighbour(path)}; expected a file or folder (from '
            f"{Path.cwd()}); correct the path"
        )
    return read_hub(source, subset, split)


def _read_builtin(source: str, text: str) -> Table:
    if source != BUILTIN:
        raise DataError(
            f'data.source = "{source}" is not known{near_miss(source, [BUILTIN])}; '
            f"the only builtin data is {BUILTIN}"
        )
    rows = [
        Row({text: file.text, "area": file.area}, f"{BUILTIN}/{file.path}")
        for file in federated_files()
    ]
    return Table(BUILTIN, (text, "area"), rows)


def _neighbour(path: Path) -> str:
    return (
        near_miss(path.name, [p.name for p in path.parent.iterdir()])
        if path.parent.is_dir()
        else ""
    )
