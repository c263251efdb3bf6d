"""`laras chat`: talk to a finished run's model, to its base, or to both side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from laras.cli.options import JsonOption, RunArgument, print_json
from laras.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    from laras.evaluation.generate import Answer, GenerationSettings
    from laras.models.finished import FinishedModels

_HELP = "/base, /tuned or /compare: who answers   /reset: forget   /quit: end\nCtrl-C ends an answer only"
# What the terminal itself writes at Ctrl-C must not begin a line, or the live columns lose their place.
_ECHO_COLUMNS = 3


def chat_command(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this once and exit.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Let the base model answer.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Let both models answer.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message of the conversation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="TOKENS", min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", min=0, help="0: the likeliest token always; default: the model's own setting."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="NUMBER", min=0.01, max=1, help="Nucleus of the sampling.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", min=0, help="Makes sampling repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to the tuned model, or to its base.

    /base and /tuned choose who answers, /compare asks both, /reset forgets, /quit ends; Ctrl-C ends an answer only.
    """
    if as_json and prompt is None:
        raise ConfigError("--json needs --prompt", hint="laras chat RUN --prompt 'What is ...?' --json")
    from laras.rundir import RunDir

    RunDir(run).load_config()
    with redirect_stdout(sys.stderr):  # some libraries greet there; stdout is for answers
        from transformers.utils.logging import set_verbosity_error

        from laras.evaluation.generate import GenerationSettings

        set_verbosity_error()  # type: ignore[no-untyped-call]
        models = _load(run)
    names = ("base", "tuned") if compare else ("base",) if base else ("tuned",)
    chat = _Chat(models, GenerationSettings(max_new_tokens, temperature, top_p, seed), system, names)
    if prompt is None:
        _converse(chat)
        return
    if not as_json:
        _show_answers(chat, prompt)
    else:
        answers = chat.ask(prompt, lambda name, piece: None)
        values = {name: {"text": a.text, "tokens": a.tokens, "stopped": a.stopped} for name, a in answers.items()}
        print_json({"run_dir": str(run), "prompt": prompt, "answers": values})


class _Chat:
    """One conversation; each model remembers its own answers."""

    def __init__(
        self, models: FinishedModels, settings: GenerationSettings, system: str | None, names: Sequence[str]
    ) -> None:
        self.models, self.settings, self.names = models, settings, tuple(names)
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._histories = {name: list(self._system) for name in ("base", "tuned")}

    def ask(self, text: str, show: Callable[[str, str], None]) -> dict[str, Answer]:
        """Lets each chosen model answer, and keeps what was said; `show` gets the model's name and a piece of text."""
        from laras.evaluation.generate import prompt_ids, stream_answer

        answers = {}
        for name in self.names:
            history = [*self._histories[name], {"role": "user", "content": text}]
            with getattr(self.models, name)() as model:
                ids = prompt_ids(self.models.tokenizer, history)
                answer = stream_answer(model, self.models.tokenizer, ids, self.settings, partial(show, name))
            self._histories[name] = [*history, {"role": "assistant", "content": answer.text}]
            answers[name] = answer
        return answers


def _load(run_dir: RunArgument) -> FinishedModels:
    import torch

    from laras.models.finished import load_finished
    from laras.records import TrainPlan
    from laras.rundir import RunDir

    run = RunDir(run_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_finished(run.load_config(), TrainPlan.load(run.path).choices, run.final, device)


def _converse(chat: _Chat) -> None:
    typer.echo(_HELP, err=True)
    while True:
        try:
            text = input(f"{' + '.join(chat.names)}> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo("", err=True)
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            chat.reset()
            typer.echo("the conversation starts anew", err=True)
        elif text in ("/base", "/tuned", "/compare"):
            chat.names = ("base", "tuned") if text == "/compare" else (text[1:],)
            typer.echo(f"now answering: {' and '.join(chat.names)}", err=True)
        elif text.startswith("/"):
            typer.echo(_HELP, err=True)
        elif text:
            try:
                _show_answers(chat, text)
            except (ConfigError, OutOfMemoryError) as error:
                typer.echo(f"error: {error}", err=True)


def _show_answers(chat: _Chat, text: str) -> None:
    """Streams the answers to stdout: two in columns on a terminal, else one after the other under their names."""
    if len(chat.names) > 1 and sys.stdout.isatty():
        _show_columns(chat, text)
        return
    current = ""

    def write(name: str, piece: str) -> None:
        nonlocal current
        if len(chat.names) > 1 and name != current:
            sys.stdout.write(f"{chr(10) * 2 * bool(current)}[{name}]\n")
        current = name
        sys.stdout.write(piece)
        sys.stdout.flush()

    chat.ask(text, write)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _show_columns(chat: _Chat, text: str) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    answers = dict.fromkeys(chat.names, "")
    console = Console(highlight=False)

    def table() -> Table:
        columns = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), width=console.width - _ECHO_COLUMNS)
        for name in answers:
            columns.add_column(f"[{name}]".replace("[", "\\["), ratio=1, overflow="fold")
        columns.add_row(*(Text(answer) for answer in answers.values()))
        return columns

    with Live(table(), console=console, transient=True, vertical_overflow="crop") as live:

        def add(name: str, piece: str) -> None:
            answers[name] += piece
            live.update(table())

        chat.ask(text, add)
    console.print(table())
