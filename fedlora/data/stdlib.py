"""The builtin corpus: the text of the Python standard library on the user's own machine.

Nothing is downloaded and nothing is shipped. Every Python carries its library as source, whose
subjects differ enough in vocabulary and style to stand for clients that see different data.
"""

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import DataError

FEDERATED_AREAS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "imaplib", "poplib", "smtplib"),
    "interpreter": ("ast", "bdb", "dis", "importlib", "inspect", "pdb", "symtable", "trace"),
    "markup": ("csv", "html", "json", "xml"),
    "networking": ("ftplib", "http", "socketserver", "urllib", "xmlrpc"),
    "numbers": (
        "_pydatetime",
        "_pydecimal",
        "calendar",
        "datetime",
        "fractions",
        "numbers",
        "random",
        "statistics",
        "zoneinfo",
    ),
    "processes": ("concurrent", "multiprocessing", "queue", "sched", "subprocess", "threading"),
    "testing": ("doctest", "timeit", "unittest"),
}
"""Subject area to the top-level packages and modules whose text a federation trains on.

Only what a plain ``python3`` of a Linux distribution installs: names that distributions split
into packages of their own (tkinter, idlelib, test ...) are left to ``PRETRAINING``. A name that
one Python version lacks is passed over, so sizes differ a little between versions.
"""

PRETRAINING: tuple[str, ...] = (
    "__future__", "_aix_support", "_collections_abc", "_compat_pickle", "_compression",
    "_markupbase", "_osx_support", "_py_abc", "_pyio", "_sitebuiltins", "_strptime",
    "_threading_local", "_weakrefset", "abc", "aifc", "antigravity", "argparse", "asynchat",
    "asyncore", "base64", "bisect", "bz2", "cProfile", "cgi", "cgitb", "chunk", "cmd", "code",
    "codecs", "codeop", "collections", "colorsys", "compileall", "configparser", "contextlib",
    "copy", "copyreg", "crypt", "ctypes", "curses", "dataclasses", "dbm", "difflib", "distutils",
    "ensurepip", "enum", "filecmp", "fileinput", "fnmatch", "functools", "genericpath", "getopt",
    "getpass", "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac", "idlelib",
    "imghdr", "imp", "io", "ipaddress", "keyword", "lib2to3", "linecache", "locale", "logging",
    "lzma", "mailbox", "mailcap", "mimetypes", "modulefinder", "netrc", "nntplib", "ntpath",
    "nturl2path", "opcode", "operator", "optparse", "os", "pathlib", "pickle", "pickletools",
    "pipes", "pkgutil", "platform", "plistlib", "posixpath", "pprint", "profile", "pstats", "pty",
    "py_compile", "pyclbr", "pydoc", "quopri", "re", "reprlib", "rlcompleter", "runpy", "secrets",
    "selectors", "shelve", "shlex", "shutil", "signal", "site", "smtpd", "sndhdr", "socket",
    "sqlite3", "ssl", "stat", "string", "stringprep", "sunau", "sysconfig", "tabnanny", "tarfile",
    "telnetlib", "tempfile", "textwrap", "tkinter", "token", "tokenize", "tomllib", "traceback",
    "tracemalloc", "tty", "turtle", "turtledemo", "types", "typing", "uu", "uuid", "venv",
    "warnings", "wave", "weakref", "webbrowser", "wsgiref", "xdrlib", "zipapp", "zipfile",
    "zipimport",
)  # fmt: skip
"""Top-level packages and modules that only the builtin model's pretraining reads.

Disjoint from ``FEDERATED_AREAS``, so the builtin model has never seen a federation's text.
``encodings`` and ``pydoc_data`` are in neither: they are tables and generated text, not programs.
"""

_PRETRAINING_AREA = "pretraining"
_MIN_BYTES = 200  # below this a file is an empty package marker or a stub
# Distributions ship these folders apart from the library, so their presence is down to chance.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "idle_test", "site-packages", "test", "tests"})


@dataclass(frozen=True)
class StdlibFile:
    """One source file of the standard library.

    Attributes:
        area: the subject area it belongs to, a key of ``FEDERATED_AREAS`` or ``"pretraining"``.
        path: where it lies below the standard library's folder, with forward slashes.
        text: its whole text, every line end a single line feed.
    """

    area: str
    path: str
    text: str


def federated_files() -> list[StdlibFile]:
    """Read every file of ``FEDERATED_AREAS`` from this machine's standard library.

    Returns:
        The files sorted by (area, path). Test folders, files of less than 200 bytes and files
        that are not UTF-8 are left out.

    Raises:
        DataError: an area has no readable file, as in a Python installed without its sources.
    """
    return _read_areas(FEDERATED_AREAS)


def pretraining_files() -> list[StdlibFile]:
    """Read every file of ``PRETRAINING`` that this machine's standard library has.

    Returns:
        The files sorted by path, all in the area ``"pretraining"``. Test folders, files of less
        than 200 bytes and files that are not UTF-8 are left out.

    Raises:
        DataError: there is no readable file, as in a Python installed without its sources.
    """
    return _read_areas({_PRETRAINING_AREA: PRETRAINING})


def _read_areas(areas: Mapping[str, Sequence[str]]) -> list[StdlibFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[StdlibFile] = []
    for area, names in sorted(areas.items()):
        found = [
            StdlibFile(area, path.relative_to(root).as_posix(), text)
            for name in names
            for path in _sources(root, name)
            if (text := _read_text(path)) is not None
        ]
        if not found:
            raise DataError(
                f"builtin:stdlib: area {area!r} has no Python source files below {root}; expected "
                f"at least one of {', '.join(names[:8])}. Use a Python installed with its standard "
                "library as .py files, or choose another data set."
            )
        files.extend(found)
    return sorted(files, key=lambda file: (file.area, file.path))


def _sources(root: Path, name: str) -> Iterator[Path]:
    module = root / f"{name}.py"
    if module.is_file():
        yield module
    for path in (root / name).rglob("*.py"):
        if path.is_file() and _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path


def _read_text(path: Path) -> str | None:
    raw = path.read_bytes()
    if len(raw) < _MIN_BYTES:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    # A Windows installation has the same text with other line ends.
    return text.replace("\r\n", "\n")
