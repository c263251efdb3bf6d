"""`laras runs`: what has been trained here, and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laras.cli.options import JsonOption, print_json


def runs_command(
    output_dir: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder of the runs, or a sweep.")] = Path(
        "runs"
    ),
    as_json: JsonOption = False,
) -> None:
    """List runs with their status and scores, the best first.

    Of a sweep its final model is listed; when the sweep is named, its trials.
    """
    from laras.rundir import list_runs
    from laras.sweep_record import TRIALS_FOLDER, final_runs, is_sweep

    runs = list_runs(output_dir / TRIALS_FOLDER if is_sweep(output_dir) else output_dir, final_runs(output_dir))
    if as_json:
        print_json({"runs": [run.model_dump(mode="json") for run in runs]})
        return
    if not runs:
        typer.echo(f"no runs in {output_dir}", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    # The name of a run is for copying: never cut, whatever the width.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
    table.caption = "base, tuned: perplexity on the sealed test set"
    for name in ("run", "status"):
        table.add_column(name, no_wrap=True, overflow="ignore")
    for name in ("steps", "val. loss", "base", "tuned"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.path,
            run.status,
            _shown(run.steps, "d"),
            _shown(run.best.eval_loss if run.best else None, ".4f"),
            _shown(run.base_perplexity, ".3f"),
            _shown(run.tuned_perplexity, ".3f"),
        )
    Console(highlight=False).print(table)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
