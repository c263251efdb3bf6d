"""`laras plan`: what would run, why, what it takes, and what would make it possible; nothing starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from laras.cli.options import ConfigArguments, JsonOption, print_json, split_arguments
from laras.cli.view import open_view
from laras.errors import ExitCode
from laras.formatting import duration, short, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from laras.records import TrainPlan

_BAR_CHARS = 40
_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # read by torch.compile
_SHOWN = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "packing", "bin_tokens",
    "cuda_graph", "max_length", "load_in_4bit", "precision", "optim", "loss_kind", "attention", "backend", "lora_r",
    "lora_alpha", "use_rslora", "target_modules", "learning_rate", "eval_steps",
)  # fmt: skip


def _gpu_names(incomplete: str) -> list[str]:
    """Cards of the catalogue as a shell completes them, in one word each: `rtx4090`, `a100-80gb`."""
    from laras.planning.catalogue import CATALOGUE

    words = [re.sub(r" (?=\d+gb$)", "-", gpu.name.lower()).replace(" ", "") for gpu in CATALOGUE]
    return [word for word in words if word.startswith(incomplete.lower())]


def plan_command(
    arguments: ConfigArguments = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="CARD",
            help="Plan for this card instead of the local one: t4, l4, rtx4090, h100 ...",
            autocompletion=_gpu_names,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what would run and why, with predicted memory and time.

    Nothing starts. When nothing fits, the exit code is 4, and single changes that would make it fit are listed.
    """
    from laras.config_file import load_config
    from laras.pipeline import plan
    from laras.planning.presentation import plan_json

    path, overrides = split_arguments(arguments or ())
    if gpu is not None:
        overrides.append(f"gpu={json.dumps(gpu)}")  # a name, though it may read as a number or as nothing
    config = load_config(path, overrides)
    with open_view() as view, _without_compiler():
        made = plan(config, view)
    if as_json:
        print_json(plan_json(made))
    else:
        show_plan(made)
    if not made.fits:
        raise typer.Exit(int(ExitCode.PLAN))


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Libraries that compile functions when they are imported load a compiler; a plan runs none of them."""
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


def show_plan(plan: TrainPlan) -> None:
    """The plan for a person: choices with reasons, memory by component, time, runners-up, remedies."""
    from rich.console import Console

    console = Console(highlight=False)
    parameters = f"{short(plan.model.total_parameters)} parameters"
    console.print(
        f"{plan.model.source} ({plan.model.model_type}, {parameters}) on {plan.hardware.gpu_name}\n", markup=False
    )
    console.print(_choices_table(plan))
    _show_memory(console, plan)
    time = plan.time
    console.print(f"\n{time.steps:,} steps at about {time.tokens_per_s:,.0f} tokens/s: {duration(time.total_s)}")
    if plan.alternatives:
        console.print("\nnext best")
        console.print(_alternatives_table(plan))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False)
    if not plan.fits:
        console.print("does not fit; what would make it possible:")
        for remedy in plan.remedies:
            console.print(f"  {remedy}", markup=False)


def _choices_table(plan: TrainPlan) -> Table:
    """Choices as they would stand in a configuration, never broken, and the reasons beside them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("choice", no_wrap=True)
    table.add_column("reason", overflow="fold")
    values = plan.choices.model_dump(mode="json")
    for name in _SHOWN:
        value, reason = values[name], plan.reasons.get(name, "")
        if value is None:
            continue
        if isinstance(value, list):
            reason = f"{reason}: {', '.join(value)}"
            value = len(value)
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float):
            value = f"{value:g}"
        table.add_row(Text(f"{name}: {value}"), Text(reason))
    return table


def _alternatives_table(plan: TrainPlan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("micro-batch", "checkpointing", "packing", "4-bit", "memory", "tokens/s", ""):
        table.add_column(name, no_wrap=True, justify="right" if name in ("memory", "tokens/s") else "left")
    for other in plan.alternatives[:2]:
        kind = other.checkpoint_kind if other.gradient_checkpointing else "off"
        table.add_row(
            f"{other.bin_tokens:,} tokens" if other.bin_tokens else f"{other.per_device_train_batch_size} rows",
            "on" if kind == "none" else kind,
            *("on" if flag else "off" for flag in (other.packing, other.load_in_4bit)),
            size(other.train_peak_allocated_bytes),
            f"{other.tokens_per_s:,.0f}",
            "fits" if other.fits else "does not fit",
        )
    return table


def _show_memory(console: Console, plan: TrainPlan) -> None:
    memory = plan.memory
    largest = max(1, memory.train_peak_allocated_bytes, memory.device_budget_bytes)
    console.print(f"\nmemory at the peak ({memory.peak_moment}; {memory.method})", markup=False)
    rows = [(name, count) for name, count in memory.components.items() if count]
    rows += [("total", memory.train_peak_allocated_bytes), ("reserved", memory.train_peak_reserved_bytes)]
    rows += [("evaluation", memory.eval_peak_allocated_bytes), ("may be used", memory.device_budget_bytes)]
    lines = [(name, "#" * min(_BAR_CHARS, round(_BAR_CHARS * count / largest)), count) for name, count in rows]
    if memory.host_bytes:
        lines.append(("main memory", "held beside it, pinned", memory.host_bytes))
    for name, bar, count in lines:
        console.print(f"  {name:<14} {bar:<{_BAR_CHARS}} {size(count):>10}", markup=False)
