"""The `laras` command: verbs, and errors turned into a message, a hint and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from laras import __version__
from laras.cli.chat import chat_command
from laras.cli.doctor import doctor_command
from laras.cli.export import export_command
from laras.cli.init import init_command
from laras.cli.inspect import inspect_command
from laras.cli.options import OVERRIDES, Verb, Verbs
from laras.cli.plan import plan_command
from laras.cli.report import report_command
from laras.cli.runs import runs_command
from laras.cli.sweep import sweep_command
from laras.cli.test import test_command
from laras.cli.train import resume_command, train_command
from laras.errors import LarasError
from laras.models.cold_start import own_process

app = typer.Typer(
    cls=Verbs,
    help="Fine-tune a language model on one GPU: a file of examples in, a tuned model with an honest score out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _add(panel: str, name: str, verb: Callable[..., None], *examples: str, overrides: bool = False) -> None:
    shown = "\n".join(["Examples:", *(f"laras {name} {example}" for example in examples)]) if examples else None
    app.command(name, cls=Verb, rich_help_panel=panel, epilog=shown, context_settings=OVERRIDES if overrides else None)(
        verb
    )


_add("Before training", "init", init_command)
_add("Before training", "doctor", doctor_command)
_add("Before training", "inspect", inspect_command, "laras.yaml", "laras.yaml on_bad_rows=skip", overrides=True)
_add("Before training", "plan", plan_command, "laras.yaml", "laras.yaml --gpu t4 max_length=1024", overrides=True)
_add("Training", "train", train_command, "laras.yaml", "laras.yaml learning_rate=1e-4 --test", "--from RUN",
     overrides=True)  # fmt: skip
_add("Training", "resume", resume_command, "RUN", "RUN --checkpoint 40")
_add("Training", "sweep", sweep_command, "laras.yaml", "laras.yaml --search learning_rate=1e-5..1e-3:log --trials 20",
     overrides=True)  # fmt: skip
_add("After training", "test", test_command, "RUN", "RUN --max-samples 200")
_add("After training", "report", report_command, "RUN", "RUN RUN --output comparison.html")
_add("After training", "chat", chat_command, "RUN", "RUN --prompt 'What is ...?' --compare")
_add("After training", "export", export_command, "RUN --format merged", "RUN --format gguf --quantization q8_0")
_add("After training", "runs", runs_command)


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
