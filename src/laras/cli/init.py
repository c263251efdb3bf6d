"""`laras init`: a commented configuration to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from laras.errors import ConfigError


def init_command(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write.")] = Path("laras.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a short, commented configuration."""
    text = resources.files("laras.resources").joinpath("laras.yaml").read_text(encoding="utf-8")
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists", hint="name another file, or replace it with --force") from None
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="check the folder and its permissions"
        ) from None
    typer.echo(f"wrote {path}", err=True)
