"""`laras export`: the tuned model for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from laras.cli.options import JsonOption, RunArgument, print_json
from laras.cli.view import open_view


class ExportFormat(StrEnum):
    """Forms of an export."""

    ADAPTER = "adapter"
    MERGED = "merged"
    GGUF = "gguf"
    OLLAMA = "ollama"


class GgufQuantization(StrEnum):
    """How GGUF stores matrices."""

    F16 = "f16"
    Q8_0 = "q8_0"


def export_command(
    run: RunArgument,
    format: Annotated[
        ExportFormat, typer.Option("--format", "-f", metavar="FORMAT", help="adapter, merged, gguf or ollama.")
    ] = ExportFormat.ADAPTER,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make; default: export/FORMAT in the run."),
    ] = None,
    quantization: Annotated[
        GgufQuantization, typer.Option("--quantization", "-q", metavar="KIND", help="Of gguf and ollama: f16 or q8_0.")
    ] = GgufQuantization.F16,
    push: Annotated[
        str | None,
        typer.Option("--push", help="Upload to this Hub repository, private when new.", metavar="OWNER/NAME"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model for other tools: adapter, merged, gguf, ollama.

    What is written is loaded again and compared; what differs is not kept. A model card says how good it is.
    """
    from laras.rundir import RunDir

    RunDir(run).require()
    from laras.reporting.export import export_run

    with open_view() as view:
        done = export_run(run, format.value, output=output, quantization=quantization.value, push=push, observer=view)
    if as_json:
        print_json(
            {
                "path": str(done.path),
                "format": done.format,
                "max_logit_difference": done.max_logit_difference,
                "tolerance": done.tolerance,
                "compared_with": done.compared_with,
                "rounding_logit_difference": done.rounding_logit_difference,
                "url": done.url,
            }
        )
        return
    if done.max_logit_difference is not None:
        typer.echo(
            f"greatest difference of a logit to {done.compared_with}: {done.max_logit_difference:.3g} "
            f"(tolerance {done.tolerance:.3g})",
            err=True,
        )
    moved = done.rounding_logit_difference
    if moved is not None:
        typer.echo(f"rounding the weights to {quantization.value} moves a logit by at most {moved:.3g}", err=True)
    typer.echo(str(done.path))
    if done.url is not None:
        typer.echo(f"pushed to {done.url}", err=True)
