"""The `laras` command: verbs, and errors turned into a message, a hint and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from laras import __version__
from laras.cli.chat import chat_command
from laras.cli.doctor import doctor_command
from laras.cli.export import export_command
from laras.cli.init import init_command
from laras.cli.inspect import inspect_command
from laras.cli.options import OVERRIDES
from laras.cli.plan import plan_command
from laras.cli.report import report_command
from laras.cli.runs import runs_command
from laras.cli.sweep import sweep_command
from laras.cli.test import test_command
from laras.cli.train import resume_command, train_command
from laras.errors import LarasError
from laras.models.cold_start import own_process

app = typer.Typer(
    help="Fine-tune a language model on one GPU: a file of examples in, a tuned model with an honest score out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("init")(init_command)
app.command("doctor")(doctor_command)
app.command("inspect", context_settings=OVERRIDES)(inspect_command)
app.command("plan", context_settings=OVERRIDES)(plan_command)
app.command("train", context_settings=OVERRIDES)(train_command)
app.command("resume")(resume_command)
app.command("sweep", context_settings=OVERRIDES)(sweep_command)
app.command("test")(test_command)
app.command("report")(report_command)
app.command("chat")(chat_command)
app.command("export")(export_command)
app.command("runs")(runs_command)


def main() -> None:
    """Runs the command line; a `LarasError` ends it with its message, its hint and its documented exit code."""
    _quieten_libraries()
    own_process()
    try:
        app()
    except LarasError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line is where printing belongs
        raise SystemExit(int(error.exit_code)) from None


def _quieten_libraries() -> None:
    """Keeps the libraries' bars and advice out of the view; what a person should know, Laras says itself."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
