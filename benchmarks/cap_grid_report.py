"""The table of `cap_grid.py report`: plans beside the best of the grid, and the grid beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from cap_grid import Setting

ENOUGH = 0.95  # of the best rate of the grid
TEXT = """
Times and allocated memory of the grid are one run of each setting. Reserved memory is left out (-) where it is not the
setting's own: three of the four models were built in a process that had measured another before, and what they took in
its segments kept those from being returned, up to 3 GiB. A model now has a process of its own. For the same reason, and
because the evaluation batch of a larger card's plan was tried there, 8B LoRA at 22 GiB has to be measured again; the
other plans held in spite of both. Plans rest on times that were seen: they were made again after the grid was measured.
The code that had not seen the grid was off by 0.17% in its allocated memory on average and 0.92% at most; today's also
has the rehearsal before the first step, and the weights that are whole while they are quantised.
""".strip()

Rows = dict[str, dict[str, Any]]


def _shown(setting: Setting) -> str:
    return setting.key.replace("|", ", ")


def table(plans: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """One line a cell: the plan, the best of the grid under the same cap, and whether the promise holds."""
    head = ["cell", "plan", "s a step", "best of the grid", "s a step", "plan / best", "holds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, plan in plans.items():
        chosen, name = Setting(**plan["setting"]), " at ".join(key.rsplit("|", 1)) + " GiB"
        shown = _shown(chosen)
        under = [row for row in found.values() if row["key"].startswith(f"{key}|")]
        ran = [row for row in under if row["step_s"] is not None]
        best = min(ran, key=lambda row: row["step_s"], default=None)
        own = found.get(f"{key}|{chosen.key}")
        if not plan["fits"]:
            verdict = "yes: nothing fits" if best is None else "**no: something fits**"
            other = f"{_shown(Setting(**best['setting']))} | {best['step_s']:.3f}" if best else "- |"
            lines.append(f"| {name} | does not fit | | {other} | | {verdict if under or best is None else ''} |")
        elif own is None:
            lines.append(f"| {name} | {shown} | not measured | | | | |")
        elif own["step_s"] is None or best is None:
            lines.append(f"| {name} | {shown} | out of memory | | | | **no** |")
        else:
            share = best["step_s"] / own["step_s"]
            verdict = "yes" if share >= ENOUGH else "**no**"
            lines.append(
                f"| {name} | {shown} | {own['step_s']:.3f} | {_shown(Setting(**best['setting']))} | "
                f"{best['step_s']:.3f} | {share:.1%} | {verdict} |"
            )
    return [line.replace("|lora", ", LoRA").replace("|qlora", ", QLoRA") for line in lines]


def errors_of(found: Rows, predicted: Rows) -> dict[str, float]:
    """Predicted allocated memory / measured - 1, of the settings without a cap."""
    free = {row["key"].replace("|free|", "|"): row for row in found.values() if "|free|" in row["key"]}
    return {
        key: predicted[key]["allocated_MiB"] / row["allocated_MiB"] - 1
        for key, row in free.items()
        if key in predicted and row["step_s"] is not None
    }


def timed_again(found: Rows) -> list[float]:
    """What the settings that ran under a cap took, over their time without, less one."""
    times = []
    for key, row in found.items():
        model, method, _, setting = key.split("|", 3)
        free = found.get(f"{model}|{method}|free|{setting}")
        if free is not None and free is not row and row["step_s"] and free["step_s"]:
            times.append(row["step_s"] / free["step_s"] - 1)
    return times


def grid_table(found: Rows, errors: dict[str, float]) -> list[str]:
    """One line a setting without a cap."""
    head = ["model, method", "setting", "s a step", "allocated MiB", "predicted", "reserved MiB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found.values():
        model, method, cap, setting = row["key"].split("|", 3)
        if cap != "free":
            continue
        seconds = "out of memory" if row["step_s"] is None else format(row["step_s"], ".3f")
        off, reserved = errors.get(f"{model}|{method}|{setting}"), row["reserved_MiB"]
        cells = [f"{model}, {method}", setting.replace("|", ", "), seconds, format(row["allocated_MiB"], ",.0f")]
        cells += ["-" if off is None else f"{off:+.2%}", "-" if reserved is None else format(reserved, ",.0f")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(plans: Rows, found: Rows, predicted: Rows, out: Path) -> None:
    """Writes it."""
    errors, again = errors_of(found, predicted), timed_again(found)
    sizes = [abs(error) for error in errors.values()]
    lines = ["# Plans under memory caps", "", "Made by `python benchmarks/cap_grid.py report`.", ""]
    lines += [*table(plans, found), ""]
    if any(row["reserved_MiB"] is None for row in found.values()):
        lines += [TEXT, ""]
    if errors and again:
        low, high = min(errors.values()), max(errors.values())
        lines += [
            "Allocated at the peak, prediction / measurement - 1:",
            f"{mean(sizes):.2%} in the mean and {max(sizes):.2%} at most without sign, from {low:+.2%} to {high:+.2%},",
            f"over {len(errors)} of the {len(predicted)} settings of today's grid; the rest is not measured yet.",
            f"A setting timed again under a cap took {min(again):+.0%} to {max(again):+.0%} longer than without.",
            "",
        ]
    out.write_text("\n".join([*lines, "The grid without a cap:", "", *grid_table(found, errors)]) + "\n")
