"""`fedlora export`"""

from pathlib import Path

import typer

from fedlora.errors import ConfigError
from fedlora.storage import file_above, staged_folder


def run_export(
    path: Path, out: Path, form: str, model: str | None, client: str | None = None
) -> None:
    """Writes the adapter in PEFT format, or the merged model.

    Raises:
        ConfigError: an unknown format, or an output folder that is not empty or lies below a
            file.
    """
    from fedlora.models.assemble import assemble
    from fedlora.models.export import export_base, export_merged, export_to_peft

    if form not in ("peft", "merged"):
        raise ConfigError(f"--format {form!r} is not known; known: peft, merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; choose another folder")
    if above := file_above(out):
        raise ConfigError(f"--out {out}: {above} is a file; choose another folder")
    assembled = assemble(path, model, client=client)
    if form == "merged":
        with staged_folder(out) as staging:
            export_merged(assembled, staging)
        typer.echo(f"wrote {out}: the base model with the adapter in its weights (float32)")
        return
    base_name = assembled.section.name
    builtin = base_name.startswith("builtin:")
    with staged_folder(out) as staging:
        export_to_peft(assembled, staging, str((out / "base").resolve()) if builtin else base_name)
        if builtin:
            export_base(assembled, staging / "base")
    typer.echo(f"wrote {out}: load it with peft.PeftModel.from_pretrained(base, {str(out)!r})")
