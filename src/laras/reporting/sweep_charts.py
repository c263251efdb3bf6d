"""The figures of a sweep. A trial's fate is told by the shape of its mark, and again by colour."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from laras.formatting import number, setting
from laras.reporting.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PLAIN_TICKS,
    RED,
    SURFACE,
    Drawing,
    finish,
    log_scale,
    new_figure,
    step_axis,
)
from laras.reporting.sweep_data import SweepData
from laras.sweep_record import Setting, SweepParameter, SweepTrial

_MARKS = {  # status → marker, colour, filled
    "finished": ("o", BLUE, True),
    "pruned": ("v", ORANGE, False),
    "failed": ("X", RED, True),
    "running": ("s", MUTED, False),
    "interrupted": ("s", MUTED, False),
}
_COLUMNS = 3
_LOG_RATIO = 4.0  # highest over lowest loss from which a linear scale hides the good trials


def trials_chart(sweep: SweepData) -> Drawing | None:
    """Lowest validation loss of every trial in the order they were tried, and the best until then."""
    scored = _scored(sweep)
    if not scored:
        return None
    figure, (axis,) = new_figure(height=3.0)
    finished = [trial for trial in scored if trial.status == "finished"]
    if finished:
        numbers, lowest = _best_until(finished, last=sweep.record.trials[-1].number)
        axis.step(numbers, lowest, where="post", color=GREEN, linewidth=1.6, label="best until then")
    _scatter(axis, [(float(trial.number), trial) for trial in scored])
    failed = [trial.number for trial in sweep.record.trials if trial.eval_loss is None and trial.status == "failed"]
    if failed:
        axis.plot(
            failed, [0.03] * len(failed), "X", color=RED, markersize=7, transform=axis.get_xaxis_transform(),
            label="failed" if not any(trial.status == "failed" for trial in scored) else None,
        )  # fmt: skip
    best = sweep.best
    if best is not None and best.eval_loss is not None:
        _ring(axis, best.number, best.eval_loss)
        axis.annotate(
            number(best.eval_loss, 4), (best.number, best.eval_loss), (0, -15), textcoords="offset points",
            ha="center", color=INK, fontsize=8.5, fontweight="bold",
        )  # fmt: skip
    axis.set_title("lowest validation loss (nats per target token)")
    axis.margins(x=0.04, y=0.22)
    _scale(axis, scored)
    step_axis(axis, "trial")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    parts = [f"Trial {trial.number}: {trial.status}, {number(trial.eval_loss, 4)}" for trial in scored[:30]]
    return finish(figure, "trials", "Validation loss of every trial", "; ".join(parts) + ".")


def parameters_chart(sweep: SweepData) -> Drawing | None:
    """Each searched key against the lowest validation loss."""
    scored = _scored(sweep)
    if not scored:
        return None
    space = sweep.record.space
    columns = min(_COLUMNS, len(space))
    rows = -(-len(space) // columns)
    figure, axes = new_figure(rows, columns, height=0.55 + 2.35 * rows)
    for axis, parameter in zip(axes, space, strict=False):
        _parameter(axis, parameter, scored)
        if sweep.best is not None and sweep.best.eval_loss is not None:
            _ring(axis, _place(parameter, sweep.best.values[parameter.name]), sweep.best.eval_loss)
        axis.set_title(parameter.name)
        axis.margins(x=0.1, y=0.15)
        _scale(axis, scored)
    for axis in axes[len(space) :]:
        axis.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("validation loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    description = "Lowest validation loss against each searched key. "
    if sweep.best is not None:
        best = ", ".join(f"{name} {setting(value)}" for name, value in sweep.best.values.items())
        description += f"The best trial, ringed, has {best} and reached {number(sweep.best.eval_loss, 4)}."
    return finish(figure, "parameters", "Searched keys against validation loss", description)


def curves_chart(sweep: SweepData) -> Drawing | None:
    """Validation loss over the steps of every trial."""
    drawn = [trial for trial in sweep.record.trials if len(sweep.curves[trial.number])]
    if not drawn:
        return None
    figure, (axis,) = new_figure(height=3.0)
    named: set[str] = set()
    for trial in sorted(drawn, key=lambda trial: trial.number == sweep.record.best):
        curve = sweep.curves[trial.number]
        is_best = trial.number == sweep.record.best
        label = f"trial {trial.number:03d}, the best" if is_best else trial.status
        marker, color, _ = _MARKS[trial.status]
        axis.plot(
            curve.step, curve.value, color=GREEN if is_best else color, linewidth=2.2 if is_best else 1.1,
            linestyle="-" if trial.status == "finished" else (0, (4, 2)), alpha=1.0 if is_best else 0.75,
            marker=None if is_best else marker, markersize=3.5, markevery=[-1],
            label=None if label in named else label,
        )  # fmt: skip
        named.add(label)
    axis.set_title("validation loss over the steps")
    axis.margins(y=0.12)
    _scale(axis, _scored(sweep))
    step_axis(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ends = [
        f"Trial {trial.number}: ends at {number(float(sweep.curves[trial.number].value[-1]), 4)}" for trial in drawn
    ]
    return finish(figure, "curves", "Validation loss over the steps of every trial", "; ".join(ends[:30]) + ".")


def _scored(sweep: SweepData) -> list[SweepTrial]:
    return [trial for trial in sweep.record.trials if trial.eval_loss is not None]


def _best_until(finished: Sequence[SweepTrial], last: int) -> tuple[list[int], list[float]]:
    numbers: list[int] = []
    lowest: list[float] = []
    for trial in finished:
        numbers.append(trial.number)
        lowest.append(min([trial.eval_loss or 0.0, *lowest[-1:]]))
    return [*numbers, last], [*lowest, lowest[-1]]


def _scatter(axis: Axes, points: Sequence[tuple[float, SweepTrial]]) -> None:
    for status, (marker, color, filled) in _MARKS.items():
        chosen = [
            (place, trial.eval_loss)
            for place, trial in points
            if trial.status == status and trial.eval_loss is not None
        ]
        if chosen:
            axis.plot(
                [place for place, _ in chosen], [loss for _, loss in chosen], marker, color=color, markersize=7,
                markerfacecolor=color if filled else SURFACE, markeredgecolor=SURFACE if filled else color,
                label=status,
            )  # fmt: skip


def _ring(axis: Axes, place: float, loss: float) -> None:
    axis.plot([place], [loss], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.3)


def _parameter(axis: Axes, parameter: SweepParameter, scored: Sequence[SweepTrial]) -> None:
    _scatter(axis, [(_place(parameter, trial.values[parameter.name]), trial) for trial in scored])
    if parameter.kind == "choice":
        axis.set_xticks(range(len(parameter.choices)), [setting(choice) for choice in parameter.choices])
        axis.set_xlim(-0.5, len(parameter.choices) - 0.5)
        axis.grid(axis="x", visible=False)
        return
    if parameter.log:
        log_scale(axis, "x")
        return
    if parameter.kind == "int":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.xaxis.set_major_formatter(PLAIN_TICKS)


def _place(parameter: SweepParameter, value: Setting) -> float:
    return float(parameter.choices.index(value)) if parameter.kind == "choice" else float(value or 0)


def _scale(axis: Axes, scored: Sequence[SweepTrial]) -> None:
    losses = [trial.eval_loss for trial in scored if trial.eval_loss is not None and trial.eval_loss > 0]
    if losses and max(losses) / min(losses) > _LOG_RATIO:
        log_scale(axis, "y")
