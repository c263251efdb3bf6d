"""Predicted against measured duration of a step: constants fitted to a part of the cases, tried on the others.

    python benchmarks/step_time.py predict  # CPU, before: results/h200/step_time_blind_predicted.jsonl
    python benchmarks/step_time.py record   # CPU: the work of measured cases, results/step_time_work.jsonl
    python benchmarks/step_time.py fit      # CPU: results/step_time.md
    python benchmarks/step_time.py choices  # CPU: the last table of it alone

Measured were the cases of `memory.py`, the blind ones among them, by `time_steps.py`: most on free cores of the host,
and of what the device limits some by their fastest step on any core. Those of `cap_grid.py` and `throughput.py` ran on
any core. Each is predicted by the rates of its own card. The work of a case
(its operations, counted while its step is simulated) is kept in a file; `commit` names the layers that were simulated.
`record` adds cases that are not there. What was measured on an H100 is of the layers of then: the fused ones of
`memory.py` have changed since and are left out, as are steps of variants that were not kept.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cap_grid
import memory
import throughput
import time_steps

from laras.models.fused import variant
from laras.planning.catalogue import CATALOGUE, find_gpu, match_device_name
from laras.planning.throughput import BUSY_HOST, RATES, Rates, on_busy_host, recorded_step_s
from laras.planning.work import Work
from laras.records import HardwareSpec

WORK, REPORT = (memory.RESULTS / f"step_time{name}" for name in ("_work.jsonl", ".md"))
BLIND = memory.RESULTS / "h200" / "step_time_blind_predicted.jsonl"
REMAINS = (
    "What remains:",
    "",
    "- Another tenant on a core makes all that the host issues take up to twice as long (`all steps on any core`).",
    "  A plan cannot know it; the rehearsal and the first steps of a run do.",
    "- A plan for a machine elsewhere takes its host to be as fast as that of the H200 here (an Intel Xeon); the local",
    "  one is measured.",
    "- Gradient accumulation of the smallest model is predicted 18% too slow: its second micro-batch is issued faster",
    "  than its first.",
    "- Plain layers of `qwen2.5-7b` are predicted 19% too fast. They were not timed on a free core: kernels ran for",
    "  174 of the 240 ms of their fastest step, as predicted (180).",
    "- `16x1, none` was the first setting of every session on the H100s, and took 15% to 20% longer when it was timed",
    "  again after the others; on the H200 it did not.",
)
HALVES, STEPS, SEED = 10, 400, 1
NEAR = 0.15  # the error that is promised
_DISPATCH_S = 190e-6  # what a launch of a compiled kernel cost the host when Triton itself dispatched it, fitted then
_OUTLIER = 0.5  # of a logarithm: more does not count, since a machine that was busy says nothing of the model
_DEVICE_WEIGHT = 0.7
_FILLED = 0.95  # of a cap: what the allocator keeps beside what is allocated takes the rest
_LEAST_FREE_STEPS = 3
# Flags that `variant` no longer has, and what was kept. A row that says nothing is of before or after the choice.
_DECIDED = {"offload": False, "document_attention": False, "swiglu_ranks": False, "direct_launch": True}
_FIXED = frozenset({"attention"})  # known from kernels alone; documents of the measured steps are too short to tell
_HOST = {"view_s": 0.0, "call_s": 0.0, "graph_s": 0.0, "engine_s": 0.0, "compiled_s": 0.0}


@cache
def hardware_of(gpu: str) -> HardwareSpec:
    """A card of the catalogue."""
    return find_gpu(gpu).to_hardware()


@dataclass(frozen=True)
class Row:
    """A measured case and its work.

    Attributes:
        key: Benchmark and case.
        measured_s: Seconds of a micro-batch, with its part of the optimizer's step.
        work: By kind of segment.
        gpu: The card.
        commit: Names the layers that were simulated.
        is_on_free_core: Whether another tenant of the host's cores was kept out.
        any_core_s: The same, on any core, where that was measured too.
        device_s: Of which the device's kernels ran, where that was measured.
        is_dispatched: By Triton itself, as all that was measured before kernels were launched directly.
        replayed: As a CUDA graph.
    """

    key: str
    measured_s: float
    work: dict[str, Work]
    span_tokens: float
    target_share: float
    accumulation: int
    is_waited_for: bool
    gpu: str
    commit: str
    is_on_free_core: bool = False
    any_core_s: float | None = None
    device_s: float | None = None
    is_dispatched: bool = False
    replayed: bool = False

    @property
    def group(self) -> str:
        """Which benchmark it is of, which layers ran, and on which card."""
        layers = "fused" if self.is_fused else "transformers"
        return f"{self.key.partition('|')[0].partition(',')[0]}, {layers} layers, {self.gpu}"

    @property
    def model(self) -> str:
        """The shape it is of."""
        if self.key.startswith("throughput"):
            return {"7b": "qwen2.5-7b", "small": "135m"}.get(self.key.split("|")[1].partition("_")[0], "qwen2.5-1.5b")
        return self.key.split("|")[1]

    @property
    def is_fused(self) -> bool:
        return any(part.compiled for part in self.work.values())

    @property
    def known_device_s(self) -> float | None:
        """What the device took, where it can be told from what the host did: not where that waits part by part."""
        return None if any(part.waits for part in self.work.values()) else self.device_s

    def predicted_s(self, rates: Rates = RATES, hardware: HardwareSpec | None = None) -> float:
        """By the constants, on its card."""
        return recorded_step_s(
            self.work,
            hardware or hardware_of(self.gpu),
            replace(rates, compiled_s=_DISPATCH_S) if self.is_dispatched else rates,
            span_tokens=self.span_tokens,
            target_share=self.target_share,
            accumulation=self.accumulation,
            is_waited_for=self.is_waited_for,
            replayed=self.replayed,
        )

    def predicted_device_s(self, rates: Rates = RATES) -> float:
        """How long the device's kernels run."""
        alone = replace(rates, **_HOST, gap_s=0.0)
        return replace(self, is_waited_for=False, is_dispatched=False).predicted_s(alone)

    def error(self, rates: Rates = RATES) -> float:
        """Prediction / measurement - 1."""
        return self.predicted_s(rates) / self.measured_s - 1

    def is_device_bound(self) -> bool:
        """Whether the device, not the host, is what takes the time."""
        alone = replace(self, is_dispatched=False).predicted_s(replace(RATES, **_HOST))
        return alone >= 0.95 * self.predicted_s()


# ------------------------------------------------------------ what was measured


Subject = tuple[dict[str, Any], Any, int | None]  # the model's configuration, the plan's choices, documents


def _simulated(gpu: str, chosen: variant.Variant, subject: Subject) -> dict[str, Any]:
    from laras.config import RunConfig
    from laras.models.simulation import trace_step
    from laras.planning.architecture import model_spec_from_config

    values, choices, documents = subject
    spec, before = model_spec_from_config(values, "m"), variant.CHOSEN
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        variant.CHOSEN = chosen
        try:
            config = RunConfig(model_name_or_path=folder)
            trace = trace_step(config, choices, spec.layers, hardware_of(gpu), documents)
        finally:
            variant.CHOSEN = before
    work = {kind: part.to_json() for kind, part in trace.work(spec.layers).items() if kind != "evaluation"}
    return {kind: part for kind, part in work.items() if any(part)}


def _row(key: str, measured_s: float, subject: Subject, **rest: Any) -> dict[str, Any]:
    known = {"target_share": 1.0, "accumulation": 1, "is_waited_for": True}
    return {"key": key, "measured_s": measured_s, **known, "chosen": variant.CHOSEN, **rest, "subject": subject}


def _of_case(name: str, case: memory.Case, measured_s: float, **rest: Any) -> dict[str, Any]:
    choices = memory.choices_of(case)
    subject = (memory._shape(case), choices, memory.documents_of(choices))
    span = choices.max_length / (2 if choices.packing else 1)
    accumulation = min(2, choices.gradient_accumulation_steps)
    return _row(f"{name}|{case.key}", measured_s, subject, span_tokens=span, accumulation=accumulation, **rest)


def _of_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Cases that `time_steps.py` timed: on a free core, or the fastest step where they were timed on any core alone."""
    facts: dict[str, dict[str, Any]] = defaultdict(dict)
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        found = facts[row.get("key", "")]
        if "device_s" in row:
            found["device_s"] = row["device_s"] / row["accumulation"]
        if "steps_s" in row:
            found["any"] = row["steps_s"]
        elif len(row.get("free_s", ())) >= _LEAST_FREE_STEPS:
            found["free"] = row["free_s"]
    blind = memory.blind_cases()
    for case in (*memory.cases(), *blind):
        fact = facts[case.key]
        free, anywhere = fact.get("free"), fact.get("any")
        if not (free or anywhere):
            continue
        count = min(2, memory.choices_of(case).gradient_accumulation_steps)
        measured_s = median(free) if free else min(anywhere)
        yield _of_case(
            "blind" if case in blind else "memory", case, measured_s / count, is_on_free_core=bool(free),
            any_core_s=median(anywhere) / count if anywhere else None, device_s=fact.get("device_s"),
        )  # fmt: skip


def _of_memory(path: Path) -> Iterator[dict[str, Any]]:
    """Steps of transformers' layers that were timed as their memory was measured, on any core."""
    facts = memory.rows_of(path)
    for case in memory.cases():
        fact = facts.get(case.key, {})
        if "micro_s" in fact and not fact["fused"]:
            yield _of_case("memory", case, fact["micro_s"])


def _of_grid(folder: Path) -> Iterator[dict[str, Any]]:
    from laras.records import PlanChoices

    plans = memory.rows_of(folder / "cap_grid_plans.jsonl")
    for key, fact in memory.rows_of(folder / "cap_grid_measured.jsonl").items():
        if not fact.get("step_s"):
            continue
        model, method, *_ = key.split("|")
        setting = cap_grid.Setting(**fact["setting"])
        planned = PlanChoices(**plans[f"{model}|{method}|{cap_grid.CAPS_GIB[-1]}"]["choices"])
        choices = cap_grid.choices_at(setting, planned)
        half = cap_grid.MAX_LENGTH // 2  # the length of its documents
        subject = (memory.MODELS[model], choices, setting.micro * cap_grid.MAX_LENGTH // half)
        micro_s = fact["step_s"] / setting.accumulation
        yield _row(f"grid|{key}", micro_s, subject, span_tokens=half, accumulation=setting.accumulation)


def _of_throughput(gpu: str, path: Path) -> Iterator[dict[str, Any]]:
    lengths = throughput.lengths()
    attended = sum(length * length for length in lengths) / sum(lengths)
    seen: dict[str, int] = defaultdict(int)
    for line in path.read_text().splitlines() if path.is_file() else ():
        fact = json.loads(line)
        if "fused" not in fact or "step_ms" not in fact:
            continue
        card = match_device_name(fact["gpu"])
        case, chosen = throughput.resolve(fact["name"])
        is_as_decided = all(fact["variant"].get(flag, kept) == kept for flag, kept in _DECIDED.items())
        if card is None or card.name != gpu or not is_as_decided or (gpu == "H100" and case.get("graph")):
            continue
        seen[fact["name"]] += 1
        _, _, shape = throughput.batches_of(case, throughput.rows())
        if shape is None:
            continue
        values = {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 32768,
            **throughput.SHAPES[case.get("shape", "1.5b")],
        }
        subject = (values, throughput.choices_of(case), shape.max_documents)
        targets = shape.max_targets / (case["rows"] * throughput.MAX_LENGTH)
        key = f"throughput, run {seen[fact['name']]}|{fact['name']}"
        rest = {"span_tokens": attended, "target_share": targets, "is_waited_for": False, "chosen": chosen}
        rest["replayed"] = bool(case.get("graph"))
        yield _row(key, fact["step_ms"] / 1e3, subject, **rest)


def _measured(gpu: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What was measured on a card."""
    sources = (
        _of_steps(folder / time_steps.FILE),
        _of_memory(folder / "memory_measured.jsonl"),
        _of_grid(folder),
        _of_throughput(gpu, folder / "throughput.jsonl"),
    )
    for row in (row for source in sources for row in source):
        yield {**row, "gpu": gpu, "is_dispatched": gpu == "H100"}


def predict(out: Path, gpu: str = "h200") -> None:
    """What the product predicts for cases that were never timed; written once, before they are."""
    if out.exists():
        sys.exit(f"{out} exists: blind predictions are made once")
    made = {"event": "predicted", "at": datetime.now(UTC).isoformat(timespec="seconds"), "code": memory._code_digest()}
    with out.open("w") as file:
        print(json.dumps(made | {"rates": asdict(RATES)}), file=file)
        for case in memory.blind_cases():
            row = {**_of_case("blind", case, 1.0), "gpu": hardware_of(gpu).name, "commit": ""}
            found = _simulated(gpu, row.pop("chosen"), row.pop("subject"))
            work = {kind: Work.from_json(part) for kind, part in found.items()}
            print(json.dumps({"key": case.key, "micro_s": Row(work=work, **row).predicted_s()}), file=file)


def record(out: Path) -> None:
    """Adds measured seconds and simulated work of cases whose measurement is not there yet."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    there = {(row["key"].rpartition("|")[2], round(row["measured_s"], 9)) for row in kept}
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with out.open("a") as file:
        for row in (row for gpu in CATALOGUE for row in _measured(gpu.name, memory.results_of(gpu))):
            if (row["key"].rpartition("|")[2], round(row["measured_s"], 9)) not in there:
                work = _simulated(row["gpu"], row.pop("chosen"), row.pop("subject"))
                print(json.dumps({**row, "commit": commit, "work": work}), file=file, flush=True)


def load(path: Path) -> list[Row]:
    """The rows that `record` wrote."""
    rows = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        work = {kind: Work.from_json(part) for kind, part in values.pop("work").items()}
        rows.append(Row(work=work, **values))
    return rows


# ------------------------------------------------------------ fit


def fit(rows: list[Row]) -> Rates:
    """The constants that make the mean error of steps, and of what the device takes of them, least.

    The search begins with those of the product.
    """
    names = [field.name for field in fields(Rates) if field.name not in _FIXED]

    def rates_at(point: list[float]) -> Rates:
        return replace(RATES, **dict(zip(names, map(exp, point), strict=True)))

    def loss(point: list[float]) -> float:
        rates = rates_at(point)
        steps = mean(min(_OUTLIER, abs(log(1 + row.error(rates)))) for row in rows)
        return steps + _DEVICE_WEIGHT * mean(
            abs(log(row.predicted_device_s(rates) / row.known_device_s)) for row in rows if row.known_device_s
        )

    return rates_at(_minimum(loss, [log(getattr(RATES, name)) for name in names]))


def _minimum(loss: Callable[[list[float]], float], start: list[float]) -> list[float]:
    """Nelder and Mead's simplex, whose moves are reflection, expansion, contraction and shrinking."""
    points = [start] + [[x + 0.2 * (i == j) for j, x in enumerate(start)] for i in range(len(start))]
    simplex = sorted((loss(point), point) for point in points)
    for _ in range(STEPS):
        worst = simplex[-1][1]
        middle = [mean(axis) for axis in zip(*(point for _, point in simplex[:-1]), strict=True)]

        def moved(by: float, middle: list[float] = middle, worst: list[float] = worst) -> tuple[float, list[float]]:
            point = [m + by * (m - w) for m, w in zip(middle, worst, strict=True)]
            return loss(point), point

        best = moved(1.0)
        if best[0] < simplex[0][0]:
            best = min(best, moved(2.0))
        elif best[0] >= simplex[-2][0]:
            best = moved(-0.5)
        if best[0] < simplex[-1][0]:
            simplex[-1] = best
        else:
            shrunk = [[(a + b) / 2 for a, b in zip(simplex[0][1], point, strict=True)] for _, point in simplex[1:]]
            simplex = [simplex[0], *((loss(point), point) for point in shrunk)]
        simplex.sort()
    return simplex[0][1]


def _held_out(rows: list[Row], key: Callable[[Row], str]) -> list[float]:
    """Errors of rows that were left out of the fit, by random halves of what `key` says."""
    generator, found = random.Random(SEED), []
    names = sorted({key(row) for row in rows})
    for _ in range(HALVES):
        fitted = set(generator.sample(names, len(names) // 2))
        rates = fit([row for row in rows if key(row) in fitted])
        found += [abs(row.error(rates)) for row in rows if key(row) not in fitted]
    return found


# ------------------------------------------------------------ the choice of a plan


def choices(rows: list[Row]) -> list[str]:
    """Of the settings that ran under a cap, the fastest by prediction against the fastest measured, card by card."""
    lines = ["| cell | predicted to be the fastest | s a step | fastest | s a step | share of its rate |"]
    lines.append("|---|---|---|---|---|---|")
    for gpu in sorted({row.gpu for row in rows if row.key.startswith("grid|")}):
        lines += _choices_on(gpu, [row for row in rows if row.gpu == gpu])
    return lines


def _choices_on(gpu: str, rows: list[Row]) -> list[str]:
    hardware = on_busy_host(hardware_of(gpu))  # where the planner compares them
    launched = [replace(row, is_dispatched=False) for row in rows]  # directly, as kernels are today
    predicted = {
        row.key.removeprefix("grid|"): row.predicted_s(hardware=hardware) * row.accumulation for row in launched
    }
    measured = memory.rows_of(memory.results_of(find_gpu(gpu)) / "cap_grid_measured.jsonl")
    lines = []
    for subject in cap_grid.subjects():
        free = {key: row for key, row in measured.items() if key.startswith(f"{subject.key}|free|") and row["step_s"]}
        for cap in cap_grid.CAPS_GIB:
            under = {key.rpartition("|free|")[2]: row for key, row in free.items() if _fits(row, cap)}
            if not under:
                continue
            chosen = min(under, key=lambda name: predicted[f"{subject.key}|free|{name}"])
            best = min(under, key=lambda name: under[name]["step_s"])
            seconds = under[chosen]["step_s"], under[best]["step_s"]
            lines.append(
                f"| {gpu}, {subject.key.replace('|', ', ')}, {cap} GiB | {chosen.replace('|', ', ')} "
                f"| {seconds[0]:.3f} | {best.replace('|', ', ')} | {seconds[1]:.3f} | {seconds[1] / seconds[0]:.1%} |"
            )
    return lines


def _fits(row: dict[str, Any], cap_gib: float) -> bool:
    return bool(row["allocated_MiB"] * memory.MIB <= _FILLED * cap_gib * cap_grid.GIB)


# ------------------------------------------------------------ report


def _line(name: str, errors: Iterable[float]) -> str:
    found = [abs(error) for error in errors]
    return f"| {name} | {len(found)} | {mean(found):.1%} | {mean(e <= NEAR for e in found):.0%} | {max(found):.1%} |"


def _blind_errors(rows: list[Row]) -> dict[str, float]:
    """Of cases that were predicted before they were timed; by their key."""
    said = {row["key"]: row["micro_s"] for row in map(json.loads, BLIND.read_text().splitlines()) if "key" in row}
    found = {row.key.partition("|")[2]: row.measured_s for row in rows if row.key.startswith("blind|")}
    return {key: said[key] / measured_s - 1 for key, measured_s in found.items() if key in said}


def report(rows: list[Row], out: Path) -> None:
    """Blind predictions, cross-validation, the constants of all rows, and every case by those of the product."""
    blind = _blind_errors(rows)
    bound = [row for row in rows if row.is_device_bound()]
    told = [row for row in rows if row.is_on_free_core or row in bound]
    cases = [row for row in rows if row.key.startswith(("memory|", "blind|")) and row.gpu == "H200"]
    anywhere = [row for row in cases if row.any_core_s]
    everything = fit(told)
    groups: dict[str, list[float]] = {
        "blind: predicted before they were timed": list(blind.values()),
        "of these, all but int8": [error for key, error in blind.items() if "int8" not in key],
        f"held out: {HALVES} random halves of the cases": _held_out(told, lambda row: row.key),
        f"held out: {HALVES} random halves of the shapes": _held_out(told, lambda row: row.model),
        "**the cases of `memory.py`**": [row.error() for row in cases],
        "of these, on free cores": [row.error() for row in cases if row.is_on_free_core],
        "of these, by their fastest step on any core": [row.error() for row in cases if not row.is_on_free_core],
        "of these, the device takes the time": [row.error() for row in cases if row in bound],
        "of these, the host takes the time": [row.error() for row in cases if row not in bound],
        "of these, all steps on any core": [replace(row, measured_s=row.any_core_s).error() for row in anywhere],
        "what the device alone takes": [
            row.predicted_device_s() / row.known_device_s - 1 for row in cases if row.known_device_s
        ],
        **{name: [row.error() for row in rows if row.group == name] for name in sorted({row.group for row in rows})},
    }
    lines = [
        "# Predicted against measured duration of a step",
        "",
        "Made by `python benchmarks/step_time.py fit` from steps that `time_steps.py`, `cap_grid.py` and",
        "`throughput.py` timed on an H200, and those and `memory.py` on H100s (older, on any core). Errors are",
        "prediction / measurement - 1. Blind predictions carry the time and a digest of the code that made them; what",
        "they got wrong, int8, was mended with the measurements known. Held out are cases, or whole shapes, that were",
        "left out of the fit that predicts them; fits leave out what the host limits on any core.",
        "",
        "| cases | predictions | mean error | within 15% | max error |",
        "|---|---|---|---|---|",
        *(_line(name, errors) for name, errors in groups.items()),
        "",
        *REMAINS,
        "",
        "| constant | in the product | fitted to all |",
        "|---|---|---|",
        *(f"| {f.name} | {getattr(RATES, f.name):.3g} | {getattr(everything, f.name):.3g} |" for f in fields(Rates)),
        "",
        "`attention` is not fitted: documents of the measured steps are too short to tell it from `attention_start`.",
        "",
        "## Choices",
        "",
        f"Of the settings of `cap_grid.py` whose allocated memory is within {_FILLED:.0%} of a cap, timed without one;",
        f"predicted for a host {BUSY_HOST} times as slow, as the planner compares them:",
        "",
        *choices(rows),
        "",
        "## Cases",
        "",
        "| case | measured ms | predicted ms | error | limited by | blind error |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.gpu}, {row.key.replace('|', ': ', 1).replace('|', ', ')} | {1e3 * row.measured_s:.1f} "
            f"| {1e3 * row.predicted_s():.1f} | {row.error():+.1%} | {'device' if row in bound else 'host'} "
            f"| {_blind_cell(blind, row)} |"
            for row in rows
        ),
    ]
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: lines.index("## Cases")]))


def _blind_cell(blind: dict[str, float], row: Row) -> str:
    error = blind.get(row.key.partition("|")[2]) if row.key.startswith("blind|") else None
    return "" if error is None else f"{error:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["predict", "record", "fit", "choices"])
    mode = parser.parse_args().mode
    if mode == "predict":
        predict(BLIND)
    elif mode == "record":
        record(WORK)
    elif mode == "fit":
        report(load(WORK), REPORT)
    else:
        print("\n".join(choices(load(WORK))))


if __name__ == "__main__":
    main()
