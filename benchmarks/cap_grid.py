"""The chosen plan against an exhaustive search over the same grid, under memory caps.

    python benchmarks/cap_grid.py plan       # CPU: results/cap_grid_plans.jsonl, and cap_grid_predicted.jsonl
    python benchmarks/cap_grid.py measure    # a GPU of 80 GB or more, random weights: results/cap_grid_measured.jsonl
    python benchmarks/cap_grid.py report     # joins them: results/cap_grid.md

Caps of 15, 22, 40 and 79 GiB (`torch.cuda.set_per_process_memory_fraction`) x a 1.5B and an 8B shape x LoRA and QLoRA.
A cap holds what the allocator reserves, so the card that it stands for has the CUDA context on top. The grid of a cell
is what the planner itself chooses from: every micro-batch and accumulation, and every kind of checkpointing. How long a
candidate takes does not depend on the cap unless memory is short, so all are timed once without one; under a cap the
candidates run from the fastest down until one does not run out of memory, each with the evaluation batch that the
planner would give it there. That one is the best of the cell. `measure` goes on where it stopped: rows that are there
are not measured again. Each model has a process of its own, and every setting makes its own optimizer states, as a run
does: what is taken in segments that an earlier setting left would keep those from being returned. For the folder of a
card see `memory.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from memory import MIB, MODELS, card, measuring_base, optimizer_of, packed_or_padded, results_of, rows_of

GIB = 2**30
CAPS_GIB = (15, 22, 40, 79)
MODELS_OF_GRID = ("qwen2.5-1.5b", "llama-3.1-8b")
MAX_LENGTH, EFFECTIVE = 1024, 16
TIMED_STEPS, TIMED_S = 2, 1.0  # at least
_GRACE_S = 30  # a subject looks at the clock between settings


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
    """A run of one setting; `step_s` is None when memory ran out, `reserved_MiB` where it is not the setting's own."""

    step_s: float | None
    allocated_MiB: float = 0.0
    reserved_MiB: float | None = 0.0


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
    """The card whose allocator may take so much; for its name see `memory.card`."""
    from laras.planning.memory import context_bytes

    hardware = card(gpu).to_hardware()
    return hardware.model_copy(update={"total_bytes": int(cap_gib * GIB) + context_bytes(hardware)})


def plan_row(subject: Subject, cap_gib: float, gpu: str = "", length: int = MAX_LENGTH) -> dict[str, Any]:
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


def grid_of(subject: Subject, cap_gib: float = CAPS_GIB[-1], length: int = MAX_LENGTH) -> dict[Setting, int]:
    """What the planner chooses from, the same whatever the cap; with the rows of an evaluation batch under this one."""
    from laras.planning.architecture import model_spec_from_config
    from laras.planning.candidates import candidates
    from laras.planning.workload import workload

    spec = model_spec_from_config(MODELS[subject.model], subject.model)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(subject, folder, length)
        found = candidates(config, spec, capped("", cap_gib), "bf16", workload(config, None, None, spec))
    grid: dict[Setting, int] = {}
    for one in found:
        setting = Setting(one.case.micro_batch, one.accumulation, one.case.checkpoint_kind)
        grid.setdefault(setting, one.case.eval_batch)
    return grid


def choices_at(setting: Setting, planned: Any, length: int = MAX_LENGTH) -> Any:
    """The choices of a plan, at another point of the grid."""
    return planned.model_copy(
        update={
            "per_device_train_batch_size": setting.micro,
            "gradient_accumulation_steps": setting.accumulation,
            "gradient_checkpointing": setting.kind != "none",
            "checkpoint_kind": setting.kind,
            "bin_tokens": setting.micro * length,
        }
    )


def predicted_rows(subject: Subject, gpu: str = "", length: int = MAX_LENGTH) -> Iterator[dict[str, Any]]:
    """Predicted memory of every setting, with the documents that are measured."""
    from laras.models.simulation import trace_step
    from laras.planning.architecture import model_spec_from_config
    from laras.planning.memory import workspace_bytes
    from laras.planning.simulated import summary_of
    from laras.records import PlanChoices

    spec, hardware = model_spec_from_config(MODELS[subject.model], subject.model), capped(gpu, CAPS_GIB[-1])
    choices = PlanChoices(**plan_row(subject, CAPS_GIB[-1], gpu, length)["choices"])
    for setting in grid_of(subject, length=length):
        with tempfile.TemporaryDirectory() as folder:
            config, own = config_of(subject, folder, length), choices_at(setting, choices, length)
            found = summary_of(trace_step(config, own, spec.layers, hardware, 2 * setting.micro), spec.layers)
        allocated = found["allocated_bytes"] + workspace_bytes(hardware)
        yield {"key": f"{subject.key}|{setting.key}", "allocated_MiB": allocated / MIB}


# ------------------------------------------------------------ measure


def search(
    subject: Subject,
    settings: list[Setting],
    plans: dict[str, dict[str, Any]],
    caps: tuple[float, ...],
    run: Run,
    done: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Rows of a subject that are not in `done`: its plans under their caps, every setting without one, each cell."""

    def measured(setting: Setting, cap: float | None, role: str) -> Iterator[dict[str, Any]]:
        key = f"{subject.key}|{'free' if cap is None else cap}|{setting.key}"
        if key not in done:
            done[key] = {"key": key, "role": role, "setting": asdict(setting), **asdict(run(setting, cap))}
            yield done[key]

    def step_s(setting: Setting, cap: float | None) -> float | None:
        row = done.get(f"{subject.key}|{'free' if cap is None else cap}|{setting.key}", {})
        return row.get("step_s")

    for cap in caps:
        plan = plans.get(f"{subject.key}|{cap}")
        if plan is not None and plan["fits"]:
            yield from measured(Setting(**plan["setting"]), cap, "plan")
    for setting in settings:
        yield from measured(setting, None, "grid")
    timed = sorted((step_s(one, None) or float("inf"), index, one) for index, one in enumerate(settings))
    for cap in caps:
        for free_s, _, setting in timed:
            free = done[f"{subject.key}|free|{setting.key}"]
            if free_s == float("inf") or free["allocated_MiB"] * MIB > cap * GIB:
                continue
            yield from measured(setting, cap, "search")
            if step_s(setting, cap) is not None:
                break


def gpu_run(subject: Subject, length: int = MAX_LENGTH) -> Run:
    """Runs settings on the GPU, on a model that is built once; the kind of checkpointing is swapped in its layers."""
    import torch

    from laras.models import build
    from laras.models.step import eager_step, path_of, target_losses
    from laras.progress import Observer
    from laras.records import PlanChoices

    choices = PlanChoices(**plan_row(subject, CAPS_GIB[-1], length=length)["choices"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, measuring_base():
        model = build.build_model(config_of(subject, folder, length), choices, device, Observer())
    fused = path_of(model).fused
    assert fused is not None, path_of(model).fused_refusal
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, step, scale = optimizer_of(choices, trained), eager_step(model), torch.ones((), device=device)

    def once(setting: Setting) -> None:
        for _ in range(setting.accumulation):
            step(packed_or_padded(MODELS[subject.model], choices, setting.micro, packed=True, device=device), scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prepare(setting: Setting, cap_gib: float | None) -> None:
        """As a run begins: no states yet, no segments of what ran before."""
        fused.keep(setting.kind)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib or whole) * GIB / whole))
            torch.cuda.reset_peak_memory_stats()

    def run(setting: Setting, cap_gib: float | None) -> Outcome:
        prepare(setting, cap_gib)
        try:
            once(setting)
            times: list[float] = []
            while len(times) < TIMED_STEPS or sum(times) < TIMED_S:
                began = time.perf_counter()
                once(setting)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            if cap_gib is not None:  # evaluation must fit as well
                model.eval()
                rows = grid_of(subject, cap_gib, length)[setting]
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


class _Missing(Exception):
    """Something is not measured yet."""


def is_missing(subject: Subject, plans: dict[str, dict[str, Any]], done: dict[str, dict[str, Any]]) -> bool:
    """Whether anything of a subject is not measured yet."""

    def asked(*_: object) -> Outcome:
        raise _Missing

    try:
        next(search(subject, list(grid_of(subject)), plans, CAPS_GIB, asked, dict(done)), None)
    except _Missing:
        return True
    return False


def lacks_its_plans(subject: Subject, plans: dict[str, dict[str, Any]], done: dict[str, dict[str, Any]]) -> bool:
    """Whether a plan of a subject was not run under its cap yet."""
    keys = [f"{subject.key}|{cap}" for cap in CAPS_GIB]
    fitting = [(key, plans[key]) for key in keys if key in plans and plans[key]["fits"]]
    return any(f"{key}|{Setting(**plan['setting']).key}" not in done for key, plan in fitting)


def measure(options: argparse.Namespace, plans: Path, out: Path) -> bool:
    """Whether everything is measured now; every subject in a process of its own, first those whose plans are open."""
    ends_at, is_whole = time.monotonic() + options.budget_s, True
    for subject in sorted(subjects(), key=lambda one: not lacks_its_plans(one, rows_of(plans), rows_of(out))):
        if options.only not in subject.key or not is_missing(subject, rows_of(plans), rows_of(out)):
            continue
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            return False
        command = [sys.executable, __file__, "measure", "--here", "--only", subject.key]
        command += ["--budget-s", str(left_s), "--results", str(options.results)]
        try:
            is_whole &= subprocess.run(command, check=False, timeout=left_s + _GRACE_S).returncode == 0
        except subprocess.TimeoutExpired:
            return False
    return is_whole


def measure_here(subject: Subject, plans: Path, out: Path, budget_s: float) -> bool:
    """Whether all of one subject is measured now."""
    began = time.monotonic()
    settings, run = list(grid_of(subject)), gpu_run(subject)
    done = rows_of(out)
    with out.open("a") as file:
        for row in search(subject, settings, rows_of(plans), CAPS_GIB, run, done):
            print(json.dumps(row), file=file, flush=True)
            print(f"{row['key']:60} {row['step_s']} {row['reserved_MiB']:.0f} MiB", flush=True)
            if time.monotonic() - began > budget_s:
                print("out of time; the next call goes on")
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["plan", "measure", "report"])
    parser.add_argument("--only", default="")
    parser.add_argument("--budget-s", type=float, default=700)
    parser.add_argument("--gpu", default="", help="card of the files; without it the one here, or an H100")
    parser.add_argument("--results", type=Path, help="another folder")
    parser.add_argument("--here", action="store_true", help="one subject, in this process")
    options = parser.parse_args()
    options.results = options.results or results_of(card(options.gpu))
    options.results.mkdir(parents=True, exist_ok=True)
    plans, measured, predicted = (
        options.results / f"cap_grid_{name}.jsonl" for name in ("plans", "measured", "predicted")
    )
    if options.mode == "plan":
        rows = [plan_row(subject, cap, options.gpu) for subject in subjects() for cap in CAPS_GIB]
        plans.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [row for subject in subjects() for row in predicted_rows(subject, options.gpu)]
        predicted.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0
    if options.mode == "measure" and options.here:
        (subject,) = (one for one in subjects() if one.key == options.only)
        return 0 if measure_here(subject, plans, measured, options.budget_s) else 3
    if options.mode == "measure":
        return 0 if measure(options, plans, measured) else 3
    from cap_grid_report import report

    report(rows_of(plans), rows_of(measured), rows_of(predicted), options.results / "cap_grid.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
