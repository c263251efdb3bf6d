"""Whether a step is replayed as a CUDA graph: where the host issues work more slowly than the device does it.

What the step allocates then belongs to the graph, so that an evaluation finds none of it free. The graph has gradients
of its own from the start, and matrix products a workspace more in the capture, and another outside it
(`laras.models.graphs`). Source: one case on an H200, `small_lora_4k` of `benchmarks/throughput.py`: 52 to 55 MiB more
at the peak, of which gradients are 19.
"""

from __future__ import annotations

import os
from dataclasses import replace

from laras.config import RunConfig
from laras.planning.candidates import Candidate
from laras.planning.memory import workspace_bytes
from laras.records import HardwareSpec, MemoryEstimate

# A step that a graph makes faster by less is not worth what evaluation loses of the memory.
_LEAST_GAIN = 0.2
_GRADIENT_BYTES = 4


def replay_refusal(config: RunConfig, hardware: HardwareSpec, one: Candidate) -> str | None:
    """Why the step of a candidate cannot be replayed, in one line; None where it can."""
    reasons = {
        "there is no GPU": hardware.kind != "cuda",
        "the layers are not Laras' own": not one.case.fused,
        "without packing every batch has another shape": not one.packing,
        "inputs of layers go to main memory": one.case.checkpoint_kind == "offload",
        "with full_determinism, as a resume begins with steps that are not replayed": config.full_determinism,
        "there are several GPUs": hardware.count > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def with_replay(
    config: RunConfig, hardware: HardwareSpec, one: Candidate, replayed: Candidate, trained: int
) -> Candidate:
    """The candidate, replayed if that is wanted, or worth it and there is the memory.

    Args:
        config: What the user wants.
        hardware: The device.
        one: Simulated; the host issues its steps.
        replayed: The same at the speed of a graph.
        trained: Parameters that are trained.
    """
    gain = 1 - one.tokens_per_s / replayed.tokens_per_s
    one = replace(one, replay_gain=gain)
    if config.cuda_graph is False or replay_refusal(config, hardware, one) is not None:
        return one
    memory = _memory(one.memory, hardware, trained)
    fits = one.fits and memory.train_peak_reserved_bytes <= memory.device_budget_bytes
    if config.cuda_graph == "auto" and (gain < _LEAST_GAIN or not fits):
        return one
    return replace(replayed, replayed=True, replay_gain=gain, memory=memory, fits=fits)


def share_of_speed(config: RunConfig, hardware: HardwareSpec, best: Candidate, other: Candidate) -> float:
    """How much of the speed that a candidate has beside the best one is left where it cannot be replayed as that is."""
    if not best.replayed or best.replay_gain is None or replay_refusal(config, hardware, other) is None:
        return 1.0
    return 1 - best.replay_gain


def replay_reason(config: RunConfig, hardware: HardwareSpec, best: Candidate) -> str:
    """One line for the plan."""
    refusal = replay_refusal(config, hardware, best)
    if config.cuda_graph is not False and best.replay_gain is None:
        refusal = refusal or "the step was not simulated"
    if refusal is not None:
        return f"off: {refusal}"
    if config.cuda_graph != "auto" or best.replay_gain is None:
        return "as configured"
    if best.replayed:
        return f"on: the host issues a step more slowly than the GPU runs it; saves {best.replay_gain:.0%} of the time"
    if best.replay_gain < _LEAST_GAIN:
        saved = f"; it would save {best.replay_gain:.0%} of the time" if best.replay_gain >= 0.01 else ""
        return f"off: the GPU is the limit{saved}"
    return "off: there is no memory for it"


def _memory(eager: MemoryEstimate, hardware: HardwareSpec, trained: int) -> MemoryEstimate:
    workspace = workspace_bytes(hardware) // 2  # of one thread's products; there are those of forward and backward
    graph = _GRADIENT_BYTES * trained + workspace
    static = sum(eager.components.get(name, 0) for name in ("weights", "optimizer", "workspace"))
    beside = min(eager.train_peak_allocated_bytes, eager.eval_peak_allocated_bytes) - static
    reserved = graph + workspace + max(0, beside)
    return eager.model_copy(
        update={
            "train_peak_allocated_bytes": eager.train_peak_allocated_bytes + graph,
            "train_peak_reserved_bytes": eager.train_peak_reserved_bytes + reserved,
            "eval_peak_allocated_bytes": eager.eval_peak_allocated_bytes + graph + workspace,
            "process_bytes": eager.process_bytes and eager.process_bytes + reserved,
            "components": {**eager.components, "CUDA graph": graph},
        }
    )
