"""`fedlora init`"""

from pathlib import Path

import typer

from fedlora.config.template import render_template
from fedlora.errors import ConfigError
from fedlora.storage import file_above, write_atomic


def run_init(path: Path | None, *, policy: bool) -> None:
    """Writes the commented job file, or the commented policy of a site.

    Raises:
        ConfigError: the file exists, or cannot go there.
    """
    if policy:
        # it takes torch
        from fedlora.client.policy import render_policy

        name, text, use = "policy.toml", render_policy(), "fedlora client --policy"
    else:
        name, text, use = "job.toml", render_template(), "fedlora simulate"
    path = path or Path(name)
    if path.is_dir():
        path = path / name
    if above := file_above(path):
        raise ConfigError(f"{path}: {above} is a file; give another path")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; create it first")
    if path.exists():
        raise ConfigError(f"{path} exists; give another path or remove it")
    write_atomic(path, text.encode())
    typer.echo(f"wrote {path}; run it with: {use} {path}")
