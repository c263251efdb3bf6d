"""`laras sweep`: settings searched by the validation loss, and what came of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laras.cli.options import ConfigArguments, JsonOption, print_json, read_config, split_arguments
from laras.cli.view import open_view
from laras.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from laras.records import EvalResult
    from laras.sweeping.outcome import SweepOutcome

_WHOLE_NAMES = 3
_SEARCHED = re.compile(r"[\d.eE+-]+\.\.[\d.eE+-]+(:\w+)?|[\d.eE+-]+(,[\d.eE+-]+)+")  # a range, or some numbers
_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")

SearchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        metavar="KEY=VALUES",
        help="What is searched, once for each key: learning_rate=1e-5..1e-3:log, num_train_epochs=1..4, "
        "lora_r=8,16,32. Without it: learning rate and rank.",
    ),
]


def sweep_command(
    arguments: ConfigArguments = None,
    trials: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Trials in all, pruned and failed ones included.", show_default="12"),
    ] = None,
    search: SearchOption = None,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop and save after this time: 45m, 2h, 1h30m.", show_default=False),
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Open the sealed test set for the final model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search settings by the validation loss.

    The same command goes on with a sweep that was stopped; so does the folder of the sweep in place of CONFIG.
    """
    from laras import pipeline
    from laras.sweeping.sweep import DEFAULT_TRIALS, continue_sweep, run_sweep

    limit_s = parse_time(time_limit) if time_limit is not None else None
    folder = _sweep_folder(arguments or [], search)
    _refuse_searches_among(arguments or [])
    with open_view() as view:
        if folder is not None:
            outcome = continue_sweep(folder, trials=trials, time_limit_s=limit_s, will_test=test, observer=view)
        else:
            config, given = read_config(arguments)
            outcome = run_sweep(
                config,
                search or (),
                trials=DEFAULT_TRIALS if trials is None else trials,
                time_limit_s=limit_s,
                will_test=test,
                given=given,
                observer=view,
            )
        evaluation = pipeline.test(outcome.final, view) if test and outcome.final else None
    _show(outcome, evaluation, as_json)


def _refuse_searches_among(arguments: list[str]) -> None:
    """`learning_rate=1e-5..1e-3` without `--search` is an easy slip, and as a value it says nothing."""
    searches = [word for word in split_arguments(arguments)[1] if _SEARCHED.fullmatch(word.partition("=")[2])]
    if searches:
        parts = [word.partition("=") for word in searches]
        raise ConfigError(
            f"{', '.join(searches)}: that is what to search, not a value",
            hint="write " + " ".join(f"--search {key.replace('-', '_')}={values}" for key, _, values in parts),
        )


def parse_time(text: str) -> float:
    """Seconds of `90`, `45s`, `30m`, `2h`, `1h30m`.

    Raises:
        ConfigError: It is no duration.
    """
    parts = _PART.findall(text.strip().lower())
    if parts and "".join(number + unit for number, unit in parts) == re.sub(r"\s", "", text.lower()):
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r:.40} is no duration", hint="for example 45m, 2h or 1h30m") from None


def _sweep_folder(arguments: list[str], search: list[str] | None) -> Path | None:
    """The folder of a sweep that is to go on, where one is named in place of a configuration."""
    from laras.sweep_record import is_sweep

    if not any(is_sweep(Path(word)) for word in arguments):
        return None
    path, overrides = split_arguments(arguments)
    if overrides or search:
        raise ConfigError(
            f"{path} goes on as it is, without {', '.join([*overrides, *(search or [])])}",
            hint="other settings make another sweep: name the configuration file instead",
        )
    return path


def _show(outcome: SweepOutcome, evaluation: EvalResult | None, as_json: bool) -> None:
    from laras.cli.test import evaluation_json, show_evaluation
    from laras.sweeping.outcome import optimism, outcome_json

    if as_json:
        print_json(outcome_json(outcome) | ({"test": evaluation_json(evaluation)} if evaluation else {}))
        return
    from rich.console import Console

    from laras.sweep_record import BEST_CONFIG_NAME, trial_dir

    record, folder = outcome.record, outcome.sweep_dir
    console = Console(highlight=False)
    _show_trials(outcome, console)
    typer.echo()
    if record.best is not None:
        typer.echo(f"best    trial {record.best:03d}, {trial_dir(folder, record.best)}")
        typer.echo(f"config  {folder / BEST_CONFIG_NAME}")
    typer.echo(f"report  {folder / 'report.html'}")
    console.print(optimism(len(record.trials)), markup=False)
    if evaluation:
        typer.echo()
        show_evaluation(evaluation)
    elif outcome.final:
        typer.echo(f"next    laras test {outcome.final}")


def _show_trials(outcome: SweepOutcome, console: Console) -> None:
    """The table: a line a trial in the order they were tried, the best one marked by a word."""
    from rich.table import Table

    from laras.formatting import setting

    record = outcome.record
    table = Table(title="Validation loss", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("trial", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("loss", "at step"):
        table.add_column(name, justify="right", no_wrap=True)
    for parameter in record.space:  # of long names, several would not fit beside each other
        name = parameter.name.replace("_", "_\n") if len(record.space) > _WHOLE_NAMES else parameter.name
        table.add_column(name, justify="right", overflow="fold")
    for trial in record.trials:
        best = trial.number == record.best
        table.add_row(
            f"{trial.number:03d}",
            f"{trial.status}, best" if best else trial.status,
            "-" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
            "-" if trial.best_step is None else str(trial.best_step),
            *(setting(trial.values.get(parameter.name)) for parameter in record.space),
            style="bold" if best else None,
        )
    console.print(table)
    for trial in record.trials:
        if trial.status == "failed":
            console.print(f"trial {trial.number:03d} failed: {trial.reason}", markup=False)
