"""Prints the requirements of a pyproject.toml, and of its extras in the second argument."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
lines = list(project["dependencies"])
for extra in filter(None, sys.argv[2].split(",")):
    lines += project["optional-dependencies"][extra]
print(*lines, sep="\n")
