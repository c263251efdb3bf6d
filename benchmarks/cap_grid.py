"""The chosen plan against an exhaustive search over the same grid, under memory caps.

    python benchmarks/cap_grid.py plan       # CPU, before anything is measured: results/cap_grid_plans.jsonl
    python benchmarks/cap_grid.py measure    # one GPU of 80 GB, random weights: results/cap_grid_measured.jsonl
    python benchmarks/cap_grid.py report     # joins them: results/cap_grid.md

Caps of 15, 22, 40 and 79 GiB (`torch.cuda.set_per_process_memory_fraction`) x a 1.5B and an 8B shape x LoRA and QLoRA.
The grid of a cell is what the planner itself chooses from: every micro-batch and accumulation, and every kind of
checkpointing. How long a candidate takes does not depend on the cap unless memory is short, so all are timed once
without one; under a cap the candidates run from the fastest down until one does not run out of memory. That one is the
best of the cell. `measure` goes on where it stopped: rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from memory import MIB, MODELS, RESULTS, measuring_base, optimizer_of, packed_or_padded

GIB = 2**30
CAPS_GIB = (15, 22, 40, 79)
MODELS_OF_GRID = ("qwen2.5-1.5b", "llama-3.1-8b")
MAX_LENGTH, EFFECTIVE = 1024, 16
TIMED_STEPS = 2
ENOUGH = 0.95  # of the best rate of the grid


@dataclass(frozen=True)
class Subject:
    """A model and how its weights are stored."""

    model: str
    four_bit: bool

    @property
    def key(self) -> str:
        return f"{self.model}|{'qlora' if self.four_bit else 'lora'}"


@dataclass(frozen=True)
class Setting:
    """A point of the grid; what the planner chooses from."""

    micro: int
    accumulation: int
    kind: str

    @property
    def key(self) -> str:
        return f"{self.micro}x{self.accumulation}|{self.kind}"


@dataclass(frozen=True)
class Outcome:
    """A run of one setting; `step_s` is None when memory ran out."""

    step_s: float | None
    allocated_MiB: float = 0.0
    reserved_MiB: float = 0.0


Run = Callable[[Setting, float | None], Outcome]  # under a cap in GiB, or under none


def subjects(models: tuple[str, ...] = MODELS_OF_GRID) -> list[Subject]:
    """Those of the issue."""
    return [Subject(model, four_bit) for model in models for four_bit in (False, True)]


# ------------------------------------------------------------ plan


def config_of(subject: Subject, folder: str, length: int = MAX_LENGTH) -> Any:
    from laras.config import RunConfig

    (Path(folder) / "config.json").write_text(json.dumps(MODELS[subject.model]))
    return RunConfig(
        model_name_or_path=folder, max_length=length, effective_batch_size=EFFECTIVE, load_in_4bit=subject.four_bit
    )


def capped(gpu: str, cap_gib: float) -> Any:
    """The card with so much memory."""
    from laras.planning.catalogue import find_gpu

    return find_gpu(gpu).to_hardware().model_copy(update={"total_bytes": int(cap_gib * GIB)})


def plan_row(subject: Subject, cap_gib: float, gpu: str = "h100", length: int = MAX_LENGTH) -> dict[str, Any]:
    """The plan of a cell, as the product makes it."""
    from laras.models.simulation import trace_step
    from laras.planning.architecture import model_spec_from_config
    from laras.planning.planner import plan_training

    spec = model_spec_from_config(MODELS[subject.model], subject.model)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_training(config_of(subject, folder, length), None, None, spec, capped(gpu, cap_gib), trace_step)
    choices = plan.choices
    kind = choices.checkpoint_kind if choices.gradient_checkpointing else "none"
    return {
        "key": f"{subject.key}|{cap_gib}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fits": plan.fits,
        "setting": asdict(Setting(choices.per_device_train_batch_size, choices.gradient_accumulation_steps, kind)),
        "choices": choices.model_dump(mode="json"),
        "reserved_MiB": plan.memory.train_peak_reserved_bytes / MIB,
        "allocated_MiB": plan.memory.train_peak_allocated_bytes / MIB,
        "step_s": EFFECTIVE * length / plan.time.tokens_per_s,
        "method": plan.memory.method,
    }


def grid_of(subject: Subject, gpu: str = "h100", length: int = MAX_LENGTH) -> list[Setting]:
    """What the planner chooses from, whatever the cap."""
    from laras.planning.architecture import model_spec_from_config
    from laras.planning.candidates import candidates
    from laras.planning.workload import workload

    spec = model_spec_from_config(MODELS[subject.model], subject.model)
    hardware = capped(gpu, CAPS_GIB[-1])
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(subject, folder, length)
        found = candidates(config, spec, hardware, "bf16", workload(config, None, None, spec))
    settings = [Setting(one.case.micro_batch, one.accumulation, one.case.checkpoint_kind) for one in found]
    return list(dict.fromkeys(settings))


# ------------------------------------------------------------ measure


def search(
    subject: Subject,
    settings: list[Setting],
    plans: dict[str, dict[str, Any]],
    caps: tuple[float, ...],
    run: Run,
    done: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Rows of a subject that are not in `done` yet: every setting without a cap, then each cell under its cap."""

    def measured(setting: Setting, cap: float | None, role: str) -> Iterator[dict[str, Any]]:
        key = f"{subject.key}|{'free' if cap is None else cap}|{setting.key}"
        if key not in done:
            done[key] = {"key": key, "role": role, "setting": asdict(setting), **asdict(run(setting, cap))}
            yield done[key]

    def step_s(setting: Setting, cap: float | None) -> float | None:
        row = done.get(f"{subject.key}|{'free' if cap is None else cap}|{setting.key}", {})
        return row.get("step_s")

    for setting in settings:
        yield from measured(setting, None, "grid")
    timed = sorted((step_s(one, None) or float("inf"), index, one) for index, one in enumerate(settings))
    for cap in caps:
        plan = plans.get(f"{subject.key}|{cap}")
        if plan is not None and plan["fits"]:
            yield from measured(Setting(**plan["setting"]), cap, "plan")
        for free_s, _, setting in timed:
            free = done[f"{subject.key}|free|{setting.key}"]
            if free_s == float("inf") or free["allocated_MiB"] * MIB > cap * GIB:
                continue
            yield from measured(setting, cap, "search")
            if step_s(setting, cap) is not None:
                break


def gpu_run(subject: Subject) -> Run:
    """Runs settings on the GPU, on a model that is built once; the kind of checkpointing is swapped in its layers."""
    import torch

    from laras.models import build
    from laras.models.step import eager_step, path_of, target_losses
    from laras.progress import Observer
    from laras.records import PlanChoices

    row = plan_row(subject, CAPS_GIB[-1])
    choices = PlanChoices(**row["choices"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, measuring_base():
        model = build.build_model(config_of(subject, folder), choices, device, Observer())
    fused = path_of(model).fused
    assert fused is not None, path_of(model).fused_refusal
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, step, scale = optimizer_of(choices, trained), eager_step(model), torch.ones((), device=device)

    def once(setting: Setting) -> None:
        for _ in range(setting.accumulation):
            step(packed_or_padded(MODELS[subject.model], choices, setting.micro, packed=True, device=device), scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(setting: Setting, cap_gib: float | None) -> Outcome:
        fused.layers = [replace(layer, checkpoint_kind=setting.kind) for layer in fused.layers]
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib or whole) * GIB / whole))
            torch.cuda.reset_peak_memory_stats()
        try:
            once(setting)
            times = []
            for _ in range(TIMED_STEPS):
                began = time.perf_counter()
                once(setting)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            if cap_gib is not None:  # evaluation must fit as well
                model.eval()
                rows = choices.per_device_eval_batch_size
                batch = packed_or_padded(MODELS[subject.model], choices, rows, packed=False, device=device)
                with torch.no_grad():
                    target_losses(model, batch)
        except torch.OutOfMemoryError:
            return Outcome(None)
        finally:
            model.train()
        if device == "cpu":
            return Outcome(median(times))
        return Outcome(median(times), torch.cuda.max_memory_allocated() / MIB, torch.cuda.max_memory_reserved() / MIB)

    return run


def measure(plans: Path, out: Path, budget_s: float, only: str) -> bool:
    """Whether everything is measured now."""
    began = time.monotonic()
    planned, done = rows_of(plans), rows_of(out)
    with out.open("a") as file:
        for subject in subjects():
            if only not in subject.key:
                continue
            run: Run | None = None

            def lazily(setting: Setting, cap: float | None, subject: Subject = subject) -> Outcome:
                nonlocal run
                run = run or gpu_run(subject)
                return run(setting, cap)

            for row in search(subject, grid_of(subject), planned, CAPS_GIB, lazily, done):
                print(json.dumps(row), file=file, flush=True)
                print(f"{row['key']:60} {row['step_s']} {row['reserved_MiB']:.0f} MiB", flush=True)
                if time.monotonic() - began > budget_s:
                    print("out of time; the next call goes on")
                    return False
            run = None
            gc.collect()
    return True


# ------------------------------------------------------------ report


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by key; none where there is no file."""
    if not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {row["key"]: row for row in rows if "key" in row}


def table(plans: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """One line a cell: the plan, the best of the grid under the same cap, and whether the promise holds."""
    head = ["cell", "plan", "s a step", "best of the grid", "s a step", "plan / best", "holds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, plan in plans.items():
        chosen, name = Setting(**plan["setting"]), " at ".join(key.rsplit("|", 1)) + " GiB"
        under = [row for row in found.values() if row["key"].startswith(f"{key}|")]
        ran = [row for row in under if row["step_s"] is not None]
        best = min(ran, key=lambda row: row["step_s"], default=None)
        own = found.get(f"{key}|{chosen.key}")
        if not plan["fits"]:
            verdict = "yes: nothing fits" if best is None else "**no: something fits**"
            other = f"{Setting(**best['setting']).key} | {best['step_s']:.3f}" if best else "- |"
            lines.append(f"| {name} | does not fit | | {other} | | {verdict if under or best is None else ''} |")
        elif own is None:
            lines.append(f"| {name} | {chosen.key} | not measured | | | | |")
        elif own["step_s"] is None or best is None:
            lines.append(f"| {name} | {chosen.key} | out of memory | | | | **no** |")
        else:
            share = best["step_s"] / own["step_s"]
            verdict = "yes" if share >= ENOUGH else "**no**"
            lines.append(
                f"| {name} | {chosen.key} | {own['step_s']:.3f} | {Setting(**best['setting']).key} | "
                f"{best['step_s']:.3f} | {share:.1%} | {verdict} |"
            )
    return [line.replace("|lora", ", LoRA").replace("|qlora", ", QLoRA") for line in lines]


def report(plans: Path, measured: Path, out: Path) -> None:
    found = rows_of(measured)
    grid = [
        f"| {row['key'].replace('|free|', ' | ').replace('|', ', ', 1)} | "
        f"{'out of memory' if row['step_s'] is None else format(row['step_s'], '.3f')} | {row['reserved_MiB']:,.0f} |"
        for row in found.values()
        if "|free|" in row["key"]
    ]
    head = ["# Plans under memory caps", "", "Made by `python benchmarks/cap_grid.py report`.", ""]
    grid_head = ["", "The grid without a cap:", "", "| model, method | setting | s a step | reserved MiB |"]
    grid_head.append("|---|---|---|---|")
    out.write_text("\n".join([*head, *table(rows_of(plans), found), *grid_head, *grid]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["plan", "measure", "report"])
    parser.add_argument("--only", default="")
    parser.add_argument("--budget-s", type=float, default=700)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    plans, measured = options.results / "cap_grid_plans.jsonl", options.results / "cap_grid_measured.jsonl"
    if options.mode == "plan":
        rows = [plan_row(subject, cap) for subject in subjects() for cap in CAPS_GIB]
        plans.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0
    if options.mode == "measure":
        return 0 if measure(plans, measured, options.budget_s, options.only) else 3
    report(plans, measured, options.results / "cap_grid.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
