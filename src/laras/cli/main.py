"""The `laras` command: verbs, and errors turned into a message, a hint and an exit code."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from laras import __version__
from laras.errors import ConfigError, LarasError

app = typer.Typer(
    help="Fine-tune a language model on one GPU: a file of examples in, a tuned model with an honest score out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line; a `LarasError` ends it with its message, its hint and its documented exit code."""
    try:
        app()
    except LarasError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line is where printing belongs
        raise SystemExit(int(error.exit_code)) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"laras {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the configuration.")] = Path("laras.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a short commented configuration."""
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
