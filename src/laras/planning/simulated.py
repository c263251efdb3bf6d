"""Memory and work by simulation, kept on disk: a plan that was made before needs neither torch nor a second run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from laras import __version__
from laras.config import RunConfig
from laras.planning.allocator import Replay, replay
from laras.planning.memory import context_bytes, workspace_bytes
from laras.planning.remembered import remembered
from laras.planning.trace import StepTrace, Unrolled
from laras.planning.work import Work
from laras.planning.workload import LargestBatch
from laras.records import HardwareSpec, MemoryEstimate, ModelSpec, PlanChoices

Simulate = Callable[[RunConfig, PlanChoices, int, HardwareSpec, int | None, LargestBatch | None], StepTrace]
"""As `laras.models.simulation.trace_step`; the pipeline hands it in."""

_LAYOUT = 10  # raised whenever what a trace means, or how it is replayed, changes
_STEPS = 4  # that are replayed: what is reserved hardly grows any more
_TRAINING = ("weights", "states", "batch", "forward", "loss", "backward", "end", "optimizer", "release")
_MOMENTS = {"loss": "loss", "backward": "backward of a layer", "forward": "forward", "optimizer": "optimizer step"}


@dataclass(frozen=True)
class SimulatedStep:
    """What a simulated step says of a plan.

    Attributes:
        memory: Predicted.
        fits: Whether the allocator fits it into the budget.
        work: What the device has to do, by kind of segment.
    """

    memory: MemoryEstimate
    fits: bool
    work: dict[str, Work]


@dataclass(frozen=True)
class _Replayed:
    """What a trace, at full depth and in the order of a run, asks of a device with a capacity.

    Attributes:
        weights: Bytes that live before the optimizer's states are there.
        states: And with them.
        peaks: Allocated bytes by kind of segment.
        fits: Whether the allocator fits it into the capacity.
        run: What the allocator did; with unlimited memory where it does not fit.
        paged_bytes: Of the optimizer's states, outside the allocator.
        work: What the device has to do, by kind of segment.
    """

    weights: int
    states: int
    peaks: dict[str, int]
    fits: bool
    run: Replay
    paged_bytes: int
    work: dict[str, Work]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the cache."""
        work = {kind: part.to_json() for kind, part in self.work.items()}
        return {**vars(self), "run": astuple(self.run), "work": work}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Replayed:
        """What `to_json` wrote."""
        work = {kind: Work.from_json(part) for kind, part in values["work"].items()}
        return cls(**{**values, "run": Replay(*values["run"]), "work": work})


def simulated_step(
    simulate: Simulate,
    config: RunConfig,
    choices: PlanChoices,
    spec: ModelSpec,
    hardware: HardwareSpec,
    budget_bytes: int,
    documents: int | None = None,
    largest: LargestBatch | None = None,
) -> SimulatedStep:
    """The predicted memory of a plan, whether the allocator fits it into the budget, and the work of its step.

    Raises:
        LarasError: The model cannot be simulated.
    """
    workspace = workspace_bytes(hardware)
    capacity = max(1, budget_bytes - workspace)
    key = _key(choices, spec, hardware, documents, largest)

    def trace() -> StepTrace:
        return remembered(
            "simulations", key, lambda: simulate(config, choices, spec.layers, hardware, documents, largest),
            read=StepTrace.from_json, written=StepTrace.to_json,
        )  # fmt: skip

    found = remembered(
        "replays", {**key, "layers": spec.layers, "capacity": capacity},
        lambda: _replay(trace(), spec.layers, capacity), read=_Replayed.from_json, written=_Replayed.to_json,
    )  # fmt: skip
    train = {kind: found.peaks.get(kind, 0) for kind in _TRAINING}
    moment = max(train, key=lambda kind: train[kind])
    peak = found.run.allocated_at_first_bytes + workspace
    reserved = found.run.peak_reserved_bytes + workspace
    static = max(found.weights, found.states)
    components = {
        "weights": found.weights,
        "optimizer": max(0, found.states - found.weights),
        "activations": max(0, train["forward"] - static),
        "loss" if moment == "loss" else "working set": max(0, train[moment] - max(train["forward"], static)),
        "workspace": workspace,
    }
    components["gradients"] = max(0, peak - sum(components.values()))
    estimate = MemoryEstimate(
        train_peak_allocated_bytes=peak,
        train_peak_reserved_bytes=reserved,
        eval_peak_allocated_bytes=found.run.allocated_after_first_bytes + workspace,
        device_budget_bytes=budget_bytes,
        components=components,
        peak_moment=_MOMENTS.get(moment, moment),
        method="simulation",
        process_bytes=reserved + context_bytes(hardware) + found.paged_bytes,
    )
    return SimulatedStep(estimate, found.fits, found.work)


def summary_of(trace: StepTrace, layers: int) -> dict[str, int]:
    """A step in a few numbers: peaks in bytes, without workspaces, and what the device and the host have to do."""
    result = _run(trace.unroll(layers).in_training(_STEPS, rehearsed=True))
    steps = [part for kind, part in trace.work(layers).items() if kind != "evaluation"]
    return {
        "allocated_bytes": result.allocated_at_first_bytes,
        "reserved_bytes": result.peak_reserved_bytes,
        "evaluation_bytes": result.allocated_after_first_bytes,
        "paged_bytes": trace.paged_bytes(layers),
        "calls": sum(part.views + part.calls + part.graph_calls + part.engine_calls for part in steps),
        "moved_bytes": sum(part.moved_bytes for part in steps),
        "product_operations": sum(part.product_operations for part in steps),
    }


def _replay(trace: StepTrace, layers: int, capacity_bytes: int) -> _Replayed:
    whole = trace.unroll(layers)
    # As a run goes: a rehearsal, after which unused segments are returned, steps, and an evaluation.
    training = whole.in_training(_STEPS, rehearsed=True)
    within = _run(training, capacity_bytes)
    return _Replayed(
        weights=whole.live_after("weights"),
        states=whole.live_after("states"),
        peaks=whole.peaks(),
        fits=within.fits,
        run=within if within.fits else _run(training),
        paged_bytes=trace.paged_bytes(layers),
        work=trace.work(layers),
    )


def _run(training: Unrolled, capacity_bytes: int | None = None) -> Replay:
    starts, evaluation_at = training.starts, len(training.until("evaluation"))
    return replay(training.events, capacity_bytes, released_at=starts[0], first=evaluation_at, starts=starts)


def _key(
    choices: PlanChoices,
    spec: ModelSpec,
    hardware: HardwareSpec,
    documents: int | None,
    largest: LargestBatch | None,
) -> dict[str, Any]:
    """All that a trace depends on."""
    return {
        "layout": _LAYOUT,
        "laras": __version__,
        "packages": {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "model": spec.config_digest,
        "choices": _deciding(choices),
        "device": [hardware.kind, hardware.compute_capability],
        "documents": documents,
        "largest": largest and astuple(largest),
    }


def _deciding(choices: PlanChoices) -> dict[str, Any]:
    """The choices that the memory of a step depends on."""
    left_out = {"learning_rate", "eval_steps", "save_steps", "logging_steps", "lora_alpha", "trainable_parameters"}
    values = choices.model_dump(mode="json", exclude=left_out)
    values["gradient_accumulation_steps"] = min(2, choices.gradient_accumulation_steps)
    return values


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
