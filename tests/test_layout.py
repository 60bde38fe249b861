"""The map from folders to packages, the links that repeat it, and the public surface."""

import subprocess
import sys
import tomllib
from pathlib import Path

import fedlora

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_links_repeat_the_package_map():
    for package, folder in SETUP["package-dir"].items():
        if package == "fedlora":
            continue
        link = ROOT / "fedlora" / package.removeprefix("fedlora.")
        assert link.is_symlink(), link
        assert link.resolve() == (ROOT / folder).resolve()


def test_package_list_is_complete():
    found = {
        ".".join(("fedlora", *path.parent.relative_to(ROOT / "fedlora").parts))
        for path in (ROOT / "fedlora").rglob("__init__.py")
    }
    for package, folder in SETUP["package-dir"].items():
        found |= {
            ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
            for path in (ROOT / folder).rglob("__init__.py")
        }
    assert sorted(found) == SETUP["packages"]


def test_public_surface_is_what_all_says():
    public = {name for name in vars(fedlora) if not name.startswith("_")}
    submodules = {path.stem for path in (ROOT / "fedlora").iterdir()}
    assert sorted(public - submodules) == sorted(set(fedlora.__all__) - {"__version__"})


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fedlora.cli.main import app; "
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'datasets') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
