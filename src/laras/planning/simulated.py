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

_LAYOUT = 10  # raised whenever what a trace means changes
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
    trace = _cached(simulate, config, choices, spec, hardware, documents, largest)
    whole = trace.unroll(spec.layers)
    peaks = whole.peaks()
    # As a run goes: a rehearsal, after which unused segments are returned, steps, and an evaluation.
    training = whole.in_training(_STEPS, rehearsed=True)
    workspace = workspace_bytes(hardware)
    train = {kind: peaks.get(kind, 0) for kind in _TRAINING}
    moment = max(train, key=lambda kind: train[kind])
    weights, states = whole.live_after("weights"), whole.live_after("states")
    result = _replayed(training, max(1, budget_bytes - workspace))
    fits = result.fits
    if not fits:
        result = _replayed(training)
    peak = result.allocated_at_first_bytes + workspace
    static = max(weights, states)
    components = {
        "weights": weights,
        "optimizer": max(0, states - weights),
        "activations": max(0, train["forward"] - static),
        "loss" if moment == "loss" else "working set": max(0, train[moment] - max(train["forward"], static)),
        "workspace": workspace,
    }
    components["gradients"] = max(0, peak - sum(components.values()))
    estimate = MemoryEstimate(
        train_peak_allocated_bytes=peak,
        train_peak_reserved_bytes=result.peak_reserved_bytes + workspace,
        eval_peak_allocated_bytes=result.allocated_after_first_bytes + workspace,
        device_budget_bytes=budget_bytes,
        components=components,
        peak_moment=_MOMENTS.get(moment, moment),
        method="simulation",
        process_bytes=result.peak_reserved_bytes + workspace + context_bytes(hardware) + trace.paged_bytes(spec.layers),
    )
    return SimulatedStep(estimate, fits, trace.work(spec.layers))


def summary_of(trace: StepTrace, layers: int) -> dict[str, int]:
    """A step in a few numbers: peaks in bytes, without workspaces, and what the device and the host have to do."""
    whole = trace.unroll(layers)
    result = _replayed(whole.in_training(_STEPS, rehearsed=True))
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


def _replayed(training: Unrolled, capacity_bytes: int | None = None) -> Replay:
    starts, evaluation_at = training.starts, len(training.until("evaluation"))
    return replay(training.events, capacity_bytes, released_at=starts[0], first=evaluation_at, starts=starts)


def _cached(
    simulate: Simulate,
    config: RunConfig,
    choices: PlanChoices,
    spec: ModelSpec,
    hardware: HardwareSpec,
    documents: int | None,
    largest: LargestBatch | None,
) -> StepTrace:
    key = {
        "layout": _LAYOUT,
        "laras": __version__,
        "packages": {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "model": spec.config_digest,
        "choices": _deciding(choices),
        "device": [hardware.kind, hardware.compute_capability],
        "documents": documents,
        "largest": largest and astuple(largest),
    }
    return remembered(
        "simulations", key, lambda: simulate(config, choices, spec.layers, hardware, documents, largest),
        read=StepTrace.from_json, written=StepTrace.to_json,
    )  # fmt: skip


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
