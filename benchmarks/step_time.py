"""Predicted against measured duration of a step: constants fitted to a part of the cases, tried on the others.

    python benchmarks/step_time.py record   # CPU: the work of measured cases, results/step_time_work.jsonl
    python benchmarks/step_time.py fit      # CPU: results/step_time.md
    python benchmarks/step_time.py choices  # CPU: the last table of it alone

Measured were the cases of `memory.py`, `cap_grid.py` and `throughput.py`, each predicted by the rates of its own card.
The work of a case (its operations, counted while its step is simulated) is kept in a file, since the layers go on
changing and the measurements do not; `commit` names the layers that were simulated. `record` adds cases that are not
there. Left out: 4-bit cases of the fused layers in `memory_measured.jsonl`, whose weights were unpacked in another way
then, and steps of variants that were not kept, or of a graph.

`results/step_time_blind.jsonl` holds what the constants of before predicted for the cases of `cap_grid.py`, the later
ones of `throughput.py` and three of `memory.py` that were measured again; none of them had a part in those constants.
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
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cap_grid
import memory
import throughput

from laras.models.fused import variant
from laras.planning.catalogue import CATALOGUE, find_gpu, match_device_name
from laras.planning.throughput import RATES, Rates, recorded_step_s
from laras.planning.work import Work
from laras.records import HardwareSpec

WORK, BLIND, REPORT = (memory.RESULTS / f"step_time{name}" for name in ("_work.jsonl", "_blind.jsonl", ".md"))
REMAINS = (
    "What remains:",
    "",
    "- The host of these machines is not the same from one minute to the next. Padded and packed rows of",
    "  `smollm2-135m` issue the same operations: 106 and 91 ms in one session, 106 and 169 ms in another; those of",
    "  `qwen2.5-0.5b` took 100 and 75 ms, those of `qwen2.5-1.5b` 92 and 124 ms; transformers' layers of",
    "  `llama-3.1-8b` took 224 ms, those of `mistral-7b`, of the same sizes, 259 ms. A plan for a card elsewhere",
    "  cannot know its host.",
    "- A launch of a compiled kernel costs the host some 0.07 ms, and 0.19 ms through Triton's own dispatch, as in all",
    "  that was measured on the H100s; one of PyTorch's costs 0.01 ms.",
    "- 4-bit layers of transformers are predicted up to 34% too fast: what bitsandbytes does in Python for each of",
    "  them is counted as any other operation's.",
    "- `16x1, none` was the first setting of every session, and took 15% to 20% longer when it was timed again after",
    "  the others, with all four subjects; a card that is warm is the likely reason. The constants lie between.",
    "- `unoptimised`: rows of new lengths in every micro-batch, with whole logits; that memory is asked from the",
    "  driver again and again is the likely reason, and no simulated step shows it.",
    "- DoRA and full fine-tuning by transformers' layers are predicted too fast by 15% to 25% in some cases, LoRA on",
    "  them too slow by as much in others: what an operation costs the host is a mean over both.",
)
HALVES, STEPS, SEED = 10, 260, 1
NEAR = 0.15  # the error that is promised
_DISPATCH_S = 190e-6  # what a launch of a compiled kernel cost the host then, fitted
_OUTLIER = 0.5  # of a logarithm: more does not count, since a machine that was busy says nothing of the model
_FILLED = 0.95  # of a cap: what the allocator keeps beside what is allocated takes the rest
# Flags that `variant` no longer has, and what was kept. A row that says nothing is of before or after the choice.
_DECIDED = {"offload": False, "document_attention": False, "swiglu_ranks": False, "direct_launch": True}
_FIXED = frozenset({"attention"})  # known from kernels alone; documents of the measured steps are too short to tell
_HOST = {"call_s": 0.0, "graph_s": 0.0, "engine_s": 0.0, "launch_s": 0.0, "compiled_s": 0.0}


@cache
def hardware_of(gpu: str) -> HardwareSpec:
    """A card of the catalogue."""
    return find_gpu(gpu).to_hardware()


@dataclass(frozen=True)
class Row:
    """A measured case and its work; `measured_s` is a micro-batch's, with its part of the optimizer's step."""

    key: str
    measured_s: float
    work: dict[str, Work]
    span_tokens: float
    target_share: float
    token_share: float
    accumulation: int
    is_waited_for: bool
    commit: str
    gpu: str = "H100"
    is_dispatched: bool = True  # by Triton itself, as all that was measured before kernels were launched directly

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

    def predicted_s(self, rates: Rates = RATES) -> float:
        """By the constants."""
        return recorded_step_s(
            self.work,
            hardware_of(self.gpu),
            replace(rates, compiled_s=_DISPATCH_S) if self.is_dispatched else rates,
            span_tokens=self.span_tokens,
            target_share=self.target_share,
            token_share=self.token_share,
            accumulation=self.accumulation,
            is_waited_for=self.is_waited_for,
        )

    def error(self, rates: Rates = RATES) -> float:
        """Prediction / measurement - 1."""
        return self.predicted_s(rates) / self.measured_s - 1

    def is_device_bound(self) -> bool:
        """Whether the device, not the host, is what takes the time."""
        return self.predicted_s(replace(RATES, **_HOST)) >= 0.95 * self.predicted_s()


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
    known = {"target_share": 1.0, "token_share": 1.0, "accumulation": 1, "is_waited_for": True}
    return {"key": key, "measured_s": measured_s, **known, "chosen": variant.CHOSEN, **rest, "subject": subject}


def _of_memory(path: Path, name: str, *, with_fused_4bit: bool) -> Iterator[dict[str, Any]]:
    facts = memory._rows(path)
    for case in memory.cases():
        fact = facts.get(case.key, {})
        if "micro_s" not in fact or (fact["fused"] and "nf4" in case.key and not with_fused_4bit):
            continue
        choices = memory.choices_of(case)
        subject = (memory.MODELS[case.model], choices, memory.documents_of(choices))
        span = choices.max_length / (2 if choices.packing else 1)
        accumulation = min(2, choices.gradient_accumulation_steps)
        yield _row(f"{name}|{case.key}", fact["micro_s"], subject, span_tokens=span, accumulation=accumulation)


def _of_grid(folder: Path) -> Iterator[dict[str, Any]]:
    from laras.records import PlanChoices

    plans = cap_grid.rows_of(folder / "cap_grid_plans.jsonl")
    for key, fact in cap_grid.rows_of(folder / "cap_grid_measured.jsonl").items():
        if not fact.get("step_s"):
            continue
        model, method, *_ = key.split("|")
        setting = cap_grid.Setting(**fact["setting"])
        planned = PlanChoices(**plans[f"{model}|{method}|{cap_grid.CAPS_GIB[-1]}"]["choices"])
        choices = planned.model_copy(
            update={
                "per_device_train_batch_size": setting.micro,
                "gradient_accumulation_steps": setting.accumulation,
                "gradient_checkpointing": setting.kind != "none",
                "checkpoint_kind": setting.kind,
            }
        )
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
        is_of_the_product = not case.get("graph") and is_as_decided
        if card is None or card.name != gpu or not is_of_the_product:
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
        yield _row(key, fact["step_ms"] / 1e3, subject, **rest)


def _measured(gpu: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What was measured on a card."""
    sources = (
        _of_memory(folder / "memory_measured.jsonl", "memory", with_fused_4bit=False),
        _of_memory(folder / "memory_today_measured.jsonl", "memory again", with_fused_4bit=True),
        _of_grid(folder),
        _of_throughput(gpu, folder / "throughput.jsonl"),
    )
    for row in (row for source in sources for row in source):
        yield {**row, "gpu": gpu}


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
                said = {**row, "is_dispatched": False, "commit": commit, "work": work}
                print(json.dumps(said), file=file, flush=True)


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
    """The constants that make the mean error least, from those of the product on."""
    names = [field.name for field in fields(Rates) if field.name not in _FIXED]

    def rates_at(point: list[float]) -> Rates:
        return replace(RATES, **dict(zip(names, map(exp, point), strict=True)))

    def loss(point: list[float]) -> float:
        rates = rates_at(point)
        return mean(min(_OUTLIER, abs(log(1 + row.error(rates)))) for row in rows)

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


def _repeated(rows: list[Row]) -> list[float]:
    """How far two measurements of the same work lie apart, as a share of the shorter one."""
    alike: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        work = {kind: part.to_json() for kind, part in row.work.items()}
        alike[json.dumps([row.gpu, work, row.accumulation, row.is_waited_for], sort_keys=True)].append(row.measured_s)
    return [max(pair) / min(pair) - 1 for found in alike.values() for pair in combinations(found, 2)]


# ------------------------------------------------------------ the choice of a plan


def choices(rows: list[Row]) -> list[str]:
    """Of the settings that ran under a cap, the fastest by prediction against the fastest measured, card by card."""
    lines = ["| cell | predicted to be the fastest | s a step | fastest | s a step | share of its rate |"]
    lines.append("|---|---|---|---|---|---|")
    for gpu in sorted({row.gpu for row in rows if row.key.startswith("grid|")}):
        lines += _choices_on(gpu, [row for row in rows if row.gpu == gpu])
    return lines


def _choices_on(gpu: str, rows: list[Row]) -> list[str]:
    predicted = {row.key.removeprefix("grid|"): row.predicted_s() * row.accumulation for row in rows}
    measured = cap_grid.rows_of(memory.results_of(find_gpu(gpu)) / "cap_grid_measured.jsonl")
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


def report(rows: list[Row], out: Path) -> None:
    """Blind predictions, cross-validation, the constants of all rows, and every case by those of the product."""
    blind = [json.loads(line) for line in BLIND.read_text().splitlines()]
    everything = fit(rows)
    bound = [row for row in rows if row.is_device_bound()]
    groups: dict[str, list[float]] = {
        "blind: measured after the constants of before were fixed": [row["error"] for row in blind],
        "blind, where the device takes the time": [row["error"] for row in blind if row["limited_by"] == "device"],
        f"held out: {HALVES} random halves of the cases": _held_out(rows, lambda row: row.key),
        f"held out: {HALVES} random halves of the shapes": _held_out(rows, lambda row: row.model),
        "all cases, the product's constants": [row.error() for row in rows],
        "of these, the device takes the time": [row.error() for row in bound],
        "of these, the host takes the time": [row.error() for row in rows if row not in bound],
        **{name: [row.error() for row in rows if row.group == name] for name in sorted({row.group for row in rows})},
    }
    repeated, cards = _repeated(rows), " and ".join(f"{gpu}s" for gpu in sorted({row.gpu for row in rows}))
    lines = [
        "# Predicted against measured duration of a step",
        "",
        "Made by `python benchmarks/step_time.py fit` from steps that `memory.py`, `cap_grid.py` and `throughput.py`",
        f"measured on {cards}. Errors are prediction / measurement - 1. Blind are predictions by the constants of",
        "before; held out are cases, or whole shapes, that were left out of the fit that predicts them.",
        "",
        "| cases | predictions | mean error | within 15% | max error |",
        "|---|---|---|---|---|",
        *(_line(name, errors) for name, errors in groups.items()),
        "",
        f"Measuring itself: {len(repeated)} pairs of measurements of the very same work lie {mean(repeated):.1%} apart",
        f"on average, {max(repeated):.0%} at most; {mean(e <= NEAR for e in repeated):.0%} of them within 15%.",
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
        f"Of the settings of `cap_grid.py` whose allocated memory is within {_FILLED:.0%} of a cap, timed without one:",
        "",
        *choices(rows),
        "",
        "## Cases",
        "",
        "| case | measured ms | predicted ms | error | limited by |",
        "|---|---|---|---|---|",
        *(
            f"| {row.gpu}, {row.key.replace('|', ': ', 1).replace('|', ', ')} | {1e3 * row.measured_s:.1f} "
            f"| {1e3 * row.predicted_s():.1f} | {row.error():+.1%} | {'device' if row in bound else 'host'} |"
            for row in rows
        ),
    ]
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: lines.index("## Cases")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["record", "fit", "choices"])
    mode = parser.parse_args().mode
    if mode == "record":
        record(WORK)
    elif mode == "fit":
        report(load(WORK), REPORT)
    else:
        print("\n".join(choices(load(WORK))))


if __name__ == "__main__":
    main()
