"""Reading a folder: pictures in class folders, data files, or one sub-folder per client."""

from pathlib import Path

from fedlora.data.files import TABLE_SUFFIXES, read_file, read_text
from fedlora.data.rows import Row, Table, join_tables
from fedlora.errors import DataError

PICTURE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".pgm",
    ".ppm",
)


def read_folder(
    path: Path,
    *,
    text: str = "text",
    image: str = "image",
    label: str = "label",
    numbered: frozenset[str] = frozenset(),
) -> Table:
    """The rows of a folder, in order of file name.

    The folder holds data files and .txt files (each one row of column `text`), or one
    sub-folder of pictures per class (each picture a row of columns `image`, its path, and
    `label`). Other files and hidden ones are passed over.

    Raises:
        DataError: it holds nothing of the kind, or a file of it is malformed.
    """
    files = [entry for entry in _entries(path) if entry.is_file()]
    tables = []
    for file in files:
        if file.suffix.lower() in TABLE_SUFFIXES:
            tables.append(read_file(file, numbered=numbered))
        elif file.suffix.lower() == ".txt":
            tables.append(Table(str(file), (text,), [Row({text: read_text(file)}, str(file))]))
    if not tables:
        tables = _class_tables(path, image, label)
    if not tables:
        raise DataError(f"{path}: {_contents(path)}")
    return join_tables(str(path), tables)


def read_client_folders(
    path: Path,
    *,
    text: str = "text",
    image: str = "image",
    label: str = "label",
    numbered: frozenset[str] = frozenset(),
) -> Table:
    """The rows of every sub-folder, each read by `read_folder` and marked with its name.

    Raises:
        DataError: `path` is no folder or has no sub-folders, or one of them cannot be read.
    """
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    if not folders:
        raise DataError(
            f"{path}: no sub-folders found; expected one per client, because partition.kind is "
            '"folders"; choose another kind to divide one source'
        )
    tables = []
    for folder in folders:
        table = read_folder(folder, text=text, image=image, label=label, numbered=numbered)
        rows = [Row(row.values, row.origin, row.folder, folder.name) for row in table.rows]
        tables.append(Table(table.name, table.columns, rows))
    return join_tables(str(path), tables)


def _entries(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder; check data.source")
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _class_tables(path: Path, image: str, label: str) -> list[Table]:
    tables = []
    for folder in _entries(path):
        if not folder.is_dir():
            continue
        rows = [
            Row({image: str(file.resolve()), label: folder.name}, str(file), folder)
            for file in _entries(folder)
            if file.suffix.lower() in PICTURE_SUFFIXES
        ]
        if rows:
            tables.append(Table(str(folder), (image, label), rows))
    return tables


def _contents(path: Path) -> str:
    wanted = (
        f"expected data files ({', '.join(TABLE_SUFFIXES)}), .txt files, or one sub-folder of "
        "pictures per class"
    )
    holding = [
        entry.name
        for entry in _entries(path)
        if entry.is_dir()
        and any(file.suffix.lower() in (*TABLE_SUFFIXES, ".txt") for file in _entries(entry))
    ]
    if holding:
        return (
            f"found sub-folders with data files ({', '.join(holding[:3])}); {wanted}; if each "
            'sub-folder is a client, set partition.kind = "folders"'
        )
    return f"found no data; {wanted}"
