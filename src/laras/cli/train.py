"""`laras train` and `laras resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laras.cli.options import ConfigArguments, JsonOption, RunArgument, print_json, read_config
from laras.cli.view import open_view
from laras.formatting import duration, size
from laras.ranks import goes_on_alone

if TYPE_CHECKING:
    from laras.pipeline import TrainOutcome
    from laras.records import EvalResult

TestOption = Annotated[bool, typer.Option("--test", help="Open the sealed test set when training has finished.")]


FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="Start from the best weights of this run (or sweep) with a fresh optimizer; without CONFIG, with its "
        "configuration.",
        show_default=False,
    ),
]
FromStepOption = Annotated[
    int | None,
    typer.Option("--checkpoint", metavar="STEP", help="With --from: start from this step, not from the best one."),
]


def train_command(
    arguments: ConfigArguments = None,
    from_run: FromOption = None,
    checkpoint: FromStepOption = None,
    test: TestOption = False,
    as_json: JsonOption = False,
) -> None:
    """Split, seal, plan, train, validate and keep the best model."""
    from laras import pipeline
    from laras.sweep_record import final_run

    config, given = read_config(arguments, from_run)
    lender = final_run(from_run) if from_run is not None else None
    with open_view() as view:
        outcome = pipeline.train(config, view, given=given, from_run=lender, checkpoint=checkpoint, will_test=test)
        if not goes_on_alone():
            return
        evaluation = pipeline.test(outcome.run_dir, view) if test else None
    _show(outcome, evaluation, as_json)


def resume_command(
    run: RunArgument,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Go on from this step, not from the newest.")
    ] = None,
    test: TestOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on where a run stopped, exactly."""
    from laras import pipeline

    with open_view() as view:
        outcome = pipeline.resume(run, view, checkpoint=checkpoint, will_test=test)
        if not goes_on_alone():
            return
        evaluation = pipeline.test(outcome.run_dir, view) if test else None
    _show(outcome, evaluation, as_json)


def outcome_json(outcome: TrainOutcome) -> dict[str, Any]:
    """What `laras train --json` and `laras resume --json` print."""
    result = outcome.result
    return {
        "run_dir": str(outcome.run_dir),
        "status": result.status,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "train_loss": result.train_loss,
        "best": result.best.model_dump(mode="json") if result.best else None,
        "plan": outcome.plan.model_dump(mode="json"),
        "measured": result.measured.model_dump(mode="json"),
        "events": [event.model_dump(mode="json") for event in result.events],
    }


def _show(outcome: TrainOutcome, evaluation: EvalResult | None, as_json: bool) -> None:
    from laras.cli.test import evaluation_json, show_evaluation

    if as_json:
        print_json(outcome_json(outcome) | ({"test": evaluation_json(evaluation)} if evaluation else {}))
        return
    result = outcome.result
    early = ", stopped early" if result.stopped_early else ""
    typer.echo(f"run     {outcome.run_dir}")
    typer.echo(f"steps   {result.steps}{early}, {duration(result.measured.elapsed_s)}")
    if result.best:
        typer.echo(f"best    step {result.best.step}, validation loss {result.best.eval_loss:.4f}")
    planned = outcome.plan.memory.train_peak_reserved_bytes
    typer.echo(f"memory  {size(result.measured.peak_reserved_bytes)}, planned {size(planned)}")
    typer.echo(f"report  {outcome.run_dir / 'report.html'}")
    if evaluation:
        typer.echo()
        show_evaluation(evaluation)
    else:
        typer.echo(f"next    laras test {outcome.run_dir}")
