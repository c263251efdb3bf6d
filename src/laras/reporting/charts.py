"""The figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from laras.formatting import GIB, interval, number, short, size
from laras.records import EvalResult, RunEvent
from laras.reporting.drawing import (
    BLUE,
    CYAN,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PLAIN_TICKS,
    PURPLE,
    RED,
    SERIES_COLORS,
    SERIES_DASHES,
    SERIES_MARKERS,
    SURFACE,
    Drawing,
    finish,
    log_scale,
    new_figure,
    step_axis,
)
from laras.reporting.history import FloatArray, History, Series, envelope
from laras.reporting.run_data import RunData

# Most marks that a figure shows of one kind of event; the table beside it lists all.
_MAX_EVENT_MARKS = 40
_LOG_RATIO = 30.0
_MAX_MARKERS = 14
_LEGEND_CHARS, _LEGEND_MARK_CHARS = 110, 9  # of a line, and what a mark and the space around it take of it
# A planned value that is so many times the measured ones would press their curve flat.
_LEVEL_SHOWN_UNTIL = 3.0
_NOT_MEASURED = "memory/planned_peak_bytes"  # the plan, which is drawn as such
_MEMORY_NAMES = {"rss": "resident (whole process)"}


def score_chart(evaluation: EvalResult) -> Drawing:
    """Loss and perplexity of base and tuned model with their intervals."""
    figure, axes = new_figure(1, 2, height=1.75)
    for axis, title, field in zip(
        axes, ("loss (nats per target token)", "perplexity"), ("loss", "perplexity"), strict=True
    ):
        for place, (name, color, marker) in enumerate((("tuned", BLUE, "o"), ("base", ORANGE, "s"))):
            score = getattr(evaluation, name)
            value, (low, high) = getattr(score, field), getattr(score, f"{field}_ci95")
            axis.plot([low, high], [place, place], color=color, linewidth=3, solid_capstyle="butt", alpha=0.45)
            axis.plot([low, high], [place, place], "|", color=color, markersize=11, markeredgewidth=1.6)
            axis.plot([value], [place], marker, color=color, markersize=8, markeredgecolor=SURFACE)
            axis.annotate(number(value), (value, place), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        axis.set_title(title)
        axis.set_yticks([0, 1], ["tuned", "base"])
        axis.set_ylim(-0.6, 1.75)
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
    base, tuned = evaluation.base, evaluation.tuned
    description = (
        f"Base: loss {number(base.loss)}, 95% interval {interval(base.loss_ci95)}; "
        f"perplexity {number(base.perplexity, 2)}. "
        f"Tuned: loss {number(tuned.loss)}, 95% interval {interval(tuned.loss_ci95)}; "
        f"perplexity {number(tuned.perplexity, 2)}. Lower is better."
    )
    return finish(figure, "score", "Score on the sealed test set, base beside tuned", description)


def loss_chart(run: RunData) -> Drawing | None:
    """Training and validation loss, and the validation perplexity below, with everything that happened marked."""
    train, validation = run.history.get("loss"), run.history.get("eval_loss")
    if not len(train) and not len(validation):
        return None
    perplexity = run.history.get("eval_perplexity")
    if not len(perplexity):
        perplexity = Series(validation.step, np.exp(validation.value))
    figure, (upper, lower) = new_figure(2, 1, height=4.9, share_x=True)
    _line(upper, train, 0, "training loss")
    _line(upper, validation, 1, "validation loss", markers=True)
    _line(lower, perplexity, 1, "validation perplexity", markers=True)
    for axis, title in ((upper, "loss (nats per target token)"), (lower, "validation perplexity")):
        axis.set_title(title)
        axis.margins(y=0.3 if axis is upper else 0.1)
        _log_if_wide(axis)
    _mark_broken(upper, train)
    _mark_events(upper, run, labels=True)
    _mark_events(lower, run, labels=False)
    step_axis(lower)
    figure.legend(*upper.get_legend_handles_labels(), loc="lower center", ncols=3)
    return finish(figure, "loss", "Loss and perplexity over the steps", _loss_description(run, train, validation))


def optimization_chart(run: RunData) -> Drawing | None:
    """Learning rate, gradient norm and speed, one above the other."""
    panels = [
        ("learning rate", run.history.get("learning_rate"), BLUE),
        ("gradient norm before clipping", run.history.get("grad_norm"), PURPLE),
        ("tokens per second", run.history.get("tokens_per_s"), GREEN),
    ]
    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return None
    figure, axes = new_figure(len(panels), 1, height=0.55 + 1.45 * len(panels), share_x=True)
    for axis, (title, series, color) in zip(axes, panels, strict=True):
        _envelope_line(axis, series, color=color, label=title, dash="-")
        axis.set_title(title)
        axis.margins(y=0.12)
        if title.startswith("learning"):
            axis.yaxis.set_major_formatter(PLAIN_TICKS)
        if title.startswith("tokens"):
            if run.plan is not None and run.plan.time.tokens_per_s > 0:
                planned = run.plan.time.tokens_per_s
                _level(axis, planned, f"planned {short(planned)}", float(series.value.max()), MUTED, (0, (5, 3)))
                axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2)
            _from_zero(axis)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if title.startswith("gradient"):
            _log_if_wide(axis)
            _mark_broken(axis, series)
    step_axis(axes[-1])
    parts = [
        f"{title}: {number(s.value.min(), 6)} to {number(s.value.max(), 6)}, last {number(s.value[-1], 6)}"
        for title, s, _ in panels
    ]
    return finish(figure, "optimization", "Learning rate, gradient norm and speed", ". ".join(parts) + ".")


def memory_chart(run: RunData) -> Drawing | None:
    """Measured memory over the steps, against the planned peak and the budget."""
    series = list(_memory_series(run.history))[: len(SERIES_COLORS)]
    if not series:
        return None
    figure, (axis,) = new_figure(height=2.9)
    for index, (name, values) in enumerate(series):
        _line(axis, values, index, name)
    description = ". ".join(f"{name}: at most {number(s.value.max(), 2)} GiB" for name, s in series) + "."
    if run.plan is not None:
        memory = run.plan.memory
        for value, label, dash in (
            (memory.train_peak_allocated_bytes, "planned peak", (0, (6, 3))),
            (memory.device_budget_bytes, "budget", (0, (1.5, 2))),
        ):
            if value > 0:
                largest = max([memory.train_peak_allocated_bytes / GIB, *(s.value.max() for _, s in series)])
                _level(axis, value / GIB, f"{label} {size(value)}", largest, INK, dash)
                description += f" {label.capitalize()}: {size(value)}."
    _from_zero(axis)
    axis.set_title("memory (GiB)")
    step_axis(axis)
    figure.legend(loc="lower center", ncols=4)
    return finish(figure, "memory", "Memory over the steps, against the plan", description)


def components_chart(run: RunData) -> Drawing | None:
    """What the planned peak is made of, beside what was measured."""
    if run.plan is None or not any(run.plan.memory.components.values()):
        return None
    memory = run.plan.memory
    parts = sorted(((value, name) for name, value in memory.components.items() if value > 0), reverse=True)
    totals = [(memory.train_peak_allocated_bytes, "planned peak"), (memory.device_budget_bytes, "budget")]
    if run.measured is not None:
        totals.insert(1, (run.measured.peak_allocated_bytes, "measured peak"))
    totals = [total for total in totals if total[0] > 0]
    figure, (left, right) = new_figure(1, 2, height=0.7 + 0.27 * max(len(parts), len(totals) + 1))
    _bars(left, [(value, name.replace("_", " ")) for value, name in parts], BLUE)
    left.set_title("planned peak, by component")
    _bars(right, totals, CYAN)
    right.set_title("plan against measurement")
    description = "Planned: " + ", ".join(f"{name.replace('_', ' ')} {size(value)}" for value, name in parts) + ". "
    description += ", ".join(f"{name} {size(value)}" for value, name in totals) + "."
    return finish(figure, "components", "What the memory is for", description)


def comparison_chart(runs: Sequence[RunData], labels: Sequence[str], metric: str, title: str) -> Drawing | None:
    """One metric of several runs, overlaid."""
    figure, (axis,) = new_figure(height=3.3)
    parts = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        series = run.history.get(metric)
        if len(series):
            reduced = envelope(series)
            _styled(axis, reduced.step, reduced.mean, index, label, markers=True)
            parts.append(f"{label}: lowest {number(series.value.min())}, last {number(series.value[-1])}")
    if not parts:
        return None
    axis.set_title(title)
    axis.margins(y=0.1)
    _log_if_wide(axis)
    step_axis(axis)
    figure.legend(loc="lower center", ncols=max(1, _LEGEND_CHARS // (_LEGEND_MARK_CHARS + max(map(len, labels)))))
    return finish(
        figure, f"compare-{metric.replace('_', '-')}", f"{title.capitalize()} of every run", ". ".join(parts) + "."
    )


def _memory_series(history: History) -> Iterator[tuple[str, Series]]:
    """Metrics `memory/…` in GiB; shares and counts are left out."""
    for name in sorted(history.series):
        series = history.get(name)
        if name.startswith("memory/") and name.endswith("_bytes") and name != _NOT_MEASURED and len(series):
            label = name.removeprefix("memory/").removesuffix("_bytes")
            yield _MEMORY_NAMES.get(label, label.replace("_", " ")), Series(series.step, series.value / GIB)


def _from_zero(axis: Axes) -> None:
    """Begins the scale at zero, with room above all that has been drawn, and fixes both."""
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])


def _level(
    axis: Axes, value: float, label: str, largest: float, color: str, dash: tuple[int, tuple[float, ...]]
) -> None:
    """A planned value as a horizontal line; one far beyond the curves stands in the legend only."""
    if value <= _LEVEL_SHOWN_UNTIL * largest:
        axis.axhline(value, color=color, linestyle=dash, linewidth=1.3, label=label)
    else:
        axis.plot([], [], color=color, linestyle=dash, linewidth=1.3, label=f"{label}, beyond this axis")


def _line(axis: Axes, series: Series, index: int, label: str, *, markers: bool = False) -> None:
    if not len(series):
        return
    if markers:
        reduced = envelope(series)
        _styled(axis, reduced.step, reduced.mean, index, label, markers=True)
        if reduced.points_per_bucket > 1:
            axis.fill_between(
                reduced.step, reduced.low, reduced.high, color=SERIES_COLORS[index], alpha=0.18, linewidth=0
            )
    else:
        _envelope_line(axis, series, color=SERIES_COLORS[index], label=label, dash=SERIES_DASHES[index])


def _envelope_line(
    axis: Axes, series: Series, *, color: str, label: str, dash: str | tuple[int, tuple[float, ...]]
) -> None:
    reduced = envelope(series)
    if reduced.points_per_bucket > 1:
        axis.fill_between(reduced.step, reduced.low, reduced.high, color=color, alpha=0.22, linewidth=0)
        label += f", mean of {reduced.points_per_bucket}"
    marker = "o" if len(series) == 1 else None  # one point makes no line
    axis.plot(reduced.step, reduced.mean, color=color, label=label, linestyle=dash, linewidth=1.4, marker=marker)


def _styled(axis: Axes, x: FloatArray, y: FloatArray, index: int, label: str, *, markers: bool) -> None:
    style = index % len(SERIES_COLORS)
    axis.plot(
        x,
        y,
        color=SERIES_COLORS[style],
        linestyle=SERIES_DASHES[style],
        marker=SERIES_MARKERS[style] if markers else None,
        markevery=max(1, len(x) // _MAX_MARKERS),
        markersize=4.5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
        label=label,
    )


def _mark_events(axis: Axes, run: RunData, *, labels: bool) -> None:
    """Vertical lines: the best step, resumes, memory splits, other events, the early stop."""
    if run.best is not None:
        axis.axvline(run.best.step, color=GREEN, linewidth=1.6, linestyle="-", alpha=0.9)
        if labels:
            _flag(axis, run.best.step, f"\u2605 best, step {run.best.step:,}", GREEN, 1.0)
    shown: dict[str, int] = {}
    for event in run.events:
        shown[event.kind] = shown.get(event.kind, 0) + 1
        if shown[event.kind] > _MAX_EVENT_MARKS:
            continue
        symbol, color, dash = _event_look(event)
        axis.axvline(event.step, color=color, linewidth=1.1, linestyle=dash)
        if labels and shown[event.kind] == 1:
            _flag(
                axis,
                event.step,
                f"{symbol} {event.kind.replace('_', ' ')}",
                color,
                0.9 - 0.1 * len(shown),
            )
        elif labels:
            _flag(axis, event.step, symbol, color, 0.9 - 0.1 * list(shown).index(event.kind) - 0.1)


def _event_look(event: RunEvent) -> tuple[str, str, tuple[int, tuple[float, ...]]]:
    kind = event.kind
    if kind == "resume":
        return "\u25b6", PURPLE, (0, (5, 2))
    if kind == "out_of_memory":
        return "\u25bc", RED, (0, (1.2, 1.6))
    if kind in ("early_stop", "failed"):
        return "\u25a0", INK, (0, (6, 2, 1.2, 2))
    return "\u25c6", ORANGE, (0, (3, 2))


def _flag(axis: Axes, step: float, text: str, color: str, height: float) -> None:
    left, right = axis.get_xlim()
    on_right_half = step > (left + right) / 2
    axis.annotate(
        text,
        (step, height),
        (-4 if on_right_half else 4, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if on_right_half else "left",
        va="top",
        color=color,
        fontsize=8.5,
        fontweight="bold",
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 0.8},
    )


def _mark_broken(axis: Axes, series: Series) -> None:
    """Crosses on the floor where the logged value was not a number."""
    if series.broken_steps:
        steps = series.broken_steps[:_MAX_EVENT_MARKS]
        axis.plot(
            steps,
            [0.02] * len(steps),
            "x",
            color=RED,
            markersize=6,
            transform=axis.get_xaxis_transform(),
            label=f"not a finite number ({len(series.broken_steps)})",
        )


def _log_if_wide(axis: Axes) -> None:
    """A logarithmic scale where a linear one would hide most of the curve."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()] or [np.zeros(0)])
    positive = values[values > 0]
    if positive.size and positive.size == values.size and positive.max() / positive.min() > _LOG_RATIO:
        log_scale(axis, "y")


def _bars(axis: Axes, items: Sequence[tuple[int, str]], color: str) -> None:
    places = range(len(items))
    largest = max(value for value, _ in items)
    axis.barh(places, [value / GIB for value, _ in items], color=color, height=0.62, alpha=0.75)
    for place, (value, _) in zip(places, items, strict=True):
        axis.annotate(size(value), (value / GIB, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(list(places), [name for _, name in items])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * largest / GIB)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set_xlabel("GiB")


def _loss_description(run: RunData, train: Series, validation: Series) -> str:
    parts = []
    for name, series in (("Training", train), ("Validation", validation)):
        if len(series):
            parts.append(
                f"{name} loss: {number(series.value[0])} at step {series.step[0]:,.0f}, {number(series.value[-1])} "
                f"at step {series.step[-1]:,.0f}, between {number(series.value.min())} and "
                f"{number(series.value.max())}."
            )
    if run.best is not None:
        perplexity = math.exp(min(run.best.eval_loss, 700))
        parts.append(
            f"Best: step {run.best.step:,}, validation loss {number(run.best.eval_loss)}, "
            f"perplexity {number(perplexity, 2)}."
        )
    parts += [f"Step {event.step:,}: {event.kind.replace('_', ' ')}." for event in run.events[:10]]
    return " ".join(parts)
