"""`laras runs`: what has been trained here, and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laras.cli.options import JsonOption, print_json


def runs_command(
    output_dir: Annotated[Path, typer.Argument(help="The folder of the runs.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List runs with their status and scores, the best first."""
    from laras.rundir import list_runs

    runs = list_runs(output_dir)
    if as_json:
        print_json({"runs": [run.model_dump(mode="json") for run in runs]})
        return
    if not runs:
        typer.echo(f"no runs in {output_dir}", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("run", "left"), ("status", "left"), ("steps", "right"), ("validation loss", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("perplexity, base to tuned", justify="right")
    for run in runs:
        scored = run.tuned_perplexity is not None and run.base_perplexity is not None
        table.add_row(
            run.path,
            run.status,
            str(run.steps) if run.steps is not None else "-",
            f"{run.best.eval_loss:.4f}" if run.best else "-",
            f"{run.base_perplexity:.2f} to {run.tuned_perplexity:.2f}" if scored else "not tested",
        )
    Console(highlight=False).print(table)
