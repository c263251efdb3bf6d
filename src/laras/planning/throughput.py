"""Duration of a training step: the arithmetic over the device's rate, or launching its kernels, whichever is longer."""

from __future__ import annotations

from laras.planning.memory import MemoryCase
from laras.records import HardwareSpec, ModelSpec

# Share of the dense peak that the eager path reaches, and seconds that one decoder layer's kernels take to launch,
# forward and backward. Source: the measured steps of tests/fixtures/h100_memory.jsonl (H100, 8B at 16k tokens).
_CUDA_EFFICIENCY = 0.4
_LAUNCH_S_PER_LAYER = 0.0065
_QUANTISED_SLOWDOWN = 1.15


def estimate_step_s(spec: ModelSpec, case: MemoryCase, hardware: HardwareSpec) -> float:
    """Seconds of one micro-batch, forward and backward."""
    tokens = case.micro_batch * case.length_tokens
    share = spec.experts_per_token / spec.experts if spec.experts else 1.0
    head = spec.vocab_size * spec.hidden_size
    attention = spec.layers * spec.attention_heads * spec.head_dim * case.length_tokens
    # Two operations a weight forward, two for the inputs' gradients, two more for the weights' when they train.
    forward = 2 * (spec.linear_parameters * share + head + attention)
    passes = (3 if case.full else 2) + (1 if case.checkpointing else 0)
    efficiency = _CUDA_EFFICIENCY if hardware.kind == "cuda" else 1.0
    compute_s = passes * forward * tokens / (hardware.peak_flops[case.precision] * efficiency)
    if case.weights in ("nf4", "int8"):
        compute_s *= _QUANTISED_SLOWDOWN
    launch_s = _LAUNCH_S_PER_LAYER * spec.layers * (2 if case.checkpointing else 1) if hardware.kind == "cuda" else 0.0
    return max(compute_s, launch_s)
