"""Durable files: written whole and synced before they get their name."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import StorageError


@contextmanager
def storage_errors(what: str | Path) -> Iterator[None]:
    """Turns an OSError inside into a StorageError that names `what`."""
    try:
        yield
    except OSError as e:
        raise StorageError(
            f"{what} cannot be written: {e.strerror or e}; free some space or choose another "
            "folder, then continue with: fedlora resume"
        ) from e


def write_atomic(path: Path, data: bytes) -> None:
    """`data` at `path`, or nothing: temporary file, fsync, rename, fsync of the folder.

    Raises:
        StorageError: the disk refused; a former file at `path` is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except OSError:
            # on a full disk what is left of it would be in the way
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sealed(data: bytes) -> bytes:
    """`data` after its SHA-256 and a newline, so that damage on disk is noticed."""
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def unsealed(data: bytes) -> bytes:
    """What `sealed` was given.

    Raises:
        ValueError: the digest is not that of the rest.
    """
    digest, _, rest = data.partition(b"\n")
    if digest != hashlib.sha256(rest).hexdigest().encode():
        raise ValueError("it does not have its digest")
    return rest


def file_above(path: Path) -> Path | None:
    """The parent of `path` that is a file, so that nothing can go below it; None if none is."""
    for parent in path.absolute().parents:
        if parent.exists():
            return None if parent.is_dir() else parent
    return None


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that becomes `folder` at the end, or nothing on any error.

    Args:
        folder: must not exist, or be empty.

    Raises:
        StorageError: the disk refused.
    """
    folder = folder.resolve()
    # a name of its own, so that what a killed process left is in nobody's way
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with storage_errors(folder):
        staging.mkdir(parents=True)
    try:
        yield staging
        with storage_errors(folder):
            os.rename(staging, folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
