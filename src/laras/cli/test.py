"""`laras test`: the sealed test set, base beside tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laras.cli.options import JsonOption, RunArgument, print_json
from laras.cli.view import open_view

if TYPE_CHECKING:
    from laras.records import EvalResult


def test_command(
    run: RunArgument,
    max_samples: Annotated[
        int | None, typer.Option(metavar="ROWS", min=1, help="Score so many rows only, drawn by the run's seed.")
    ] = None,
    answers: Annotated[
        int, typer.Option(metavar="ROWS", min=0, help="Let both models answer so many rows, for the report.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Score the base and the tuned model on the sealed test set.

    For finished runs. Every opening of the set is noted in the run's ledger.
    """
    from laras import pipeline
    from laras.data.sealed import read_openings

    with open_view() as view:
        evaluation = pipeline.test(run, view, max_samples=max_samples, answers=answers)
    if as_json:
        print_json(evaluation_json(evaluation))
        return
    show_evaluation(evaluation)
    trials = read_openings(run)[-1].validation_trials
    if trials > 1:
        typer.echo(f"best of {trials} trials by validation loss, which is optimistic; this score is not")


def evaluation_json(evaluation: EvalResult) -> dict[str, Any]:
    """What `laras test --json` prints."""
    return evaluation.model_dump(mode="json", exclude={"schema_version", "parent_digest"})


def show_evaluation(evaluation: EvalResult) -> None:
    """The table of both models on stdout."""
    from rich.console import Console
    from rich.table import Table

    base, tuned = evaluation.base, evaluation.tuned
    table = Table(title="Sealed test set", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "base", "tuned", "change"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    change = tuned.perplexity / base.perplexity - 1
    table.add_row("loss (nats/token)", f"{base.loss:.4f}", f"{tuned.loss:.4f}", f"{tuned.loss - base.loss:+.4f}")
    table.add_row("  95% interval", _interval(base.loss_ci95, 4), _interval(tuned.loss_ci95, 4))
    table.add_row("perplexity", f"{base.perplexity:.3f}", f"{tuned.perplexity:.3f}", f"{change:+.1%}")
    table.add_row("  95% interval", _interval(base.perplexity_ci95, 3), _interval(tuned.perplexity_ci95, 3))
    gained = f"{100 * (tuned.token_accuracy - base.token_accuracy):+.1f} points"
    table.add_row("token accuracy", f"{base.token_accuracy:.1%}", f"{tuned.token_accuracy:.1%}", gained)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{base.examples:,} examples, {base.target_tokens:,} target tokens; improvement in loss "
        f"{_interval(evaluation.loss_improvement_ci95, 4)} (paired bootstrap, 95%); opened "
        f"{evaluation.openings} time{'s' * (evaluation.openings != 1)}",
        markup=False,
    )


def _interval(bounds: tuple[float, float], digits: int) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
