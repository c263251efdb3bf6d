"""`laras report`: one HTML page about a run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run or a sweep, or several to compare.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; default: report.html in the run."),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several compared.

    Scores, curves, memory, data, plan. Nothing is loaded from a network; of a run that trains it shows what is there.
    """
    from laras.rundir import RunDir
    from laras.sweep_record import is_sweep

    for path in runs:
        if not is_sweep(path):
            RunDir(path).require()
    from laras.reporting.report import write_report

    typer.echo(str(write_report(runs, output)))
