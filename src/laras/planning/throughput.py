"""Duration of a training step: arithmetic over the device's rates, plus memory traffic, or launching its kernels,
whichever is longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from laras.planning.memory import MemoryCase, adapted_layers
from laras.records import HardwareSpec, ModelSpec


@dataclass(frozen=True)
class Rates:
    """Shares of the datasheet's peaks that a path reaches, and what its launches cost.

    Attributes:
        matrix: Of the dense peak, by the large matrix products.
        attention: Of the dense peak, by the attention kernels.
        bandwidth: Of the memory bandwidth, by pointwise kernels.
        launch_s: Seconds that one layer's kernels take to launch, forward and backward.
        traffic: Hidden-sized tensors that a layer's pointwise kernels read or write, forward and backward.
    """

    matrix: float
    attention: float
    bandwidth: float
    launch_s: float
    traffic: float


# Source: benchmarks/results/memory.md (H100); the plain path from tests/fixtures/h100_memory.jsonl as well.
FUSED = Rates(matrix=0.60, attention=0.30, bandwidth=0.75, launch_s=0.0034, traffic=14.0)
PLAIN = Rates(matrix=0.52, attention=0.28, bandwidth=0.70, launch_s=0.0072, traffic=60.0)
CPU = Rates(matrix=1.0, attention=1.0, bandwidth=0.5, launch_s=0.0, traffic=20.0)
_DEQUANTISED_BYTES = 9.0  # a 4-bit weight is unpacked, copied into place and read again
_UNPACK_LAUNCH_S = 0.0022  # seconds a layer to launch that


def estimate_step_s(
    spec: ModelSpec,
    case: MemoryCase,
    hardware: HardwareSpec,
    *,
    attended_tokens: float | None = None,
    target_share: float = 1.0,
) -> float:
    """Seconds of one micro-batch, forward and backward.

    Args:
        spec: The architecture.
        case: The micro-batch and its path.
        hardware: The device.
        attended_tokens: Mean length of what a token attends within; None is the case's length.
        target_share: Share of the tokens that carry loss; logits of others are not computed.
    """
    rates = CPU if hardware.kind == "cpu" else FUSED if case.fused else PLAIN
    tokens = case.micro_batch * case.length_tokens
    peak = hardware.peak_flops[case.precision]
    share = spec.experts_per_token / spec.experts if spec.experts else 1.0
    # Two operations a weight forward, two for the inputs' gradients, two more for the weights' when they train.
    recomputes = 0.0
    if case.checkpointing:
        recomputes = 0.65 if case.fused and case.checkpoint_kind == "selective" else 1.0
    passes = (3 if case.full else 2) + recomputes
    linear = 2 * spec.linear_parameters * share * passes
    if not case.full:
        adapters = sum(inputs + outputs for _, inputs, outputs in adapted_layers(spec, case.target_modules))
        linear += 2 * spec.layers * case.lora_r * adapters * (3 + recomputes)
    head = 2 * spec.vocab_size * spec.hidden_size * (3 if case.full else 2) * target_share
    span = attended_tokens if attended_tokens is not None else case.length_tokens
    # Causal: half of the square; backward has five products to forward's two.
    attention_again = 1 if case.checkpointing and not (case.fused and case.checkpoint_kind == "selective") else 0
    attention = spec.layers * spec.attention_heads * spec.head_dim * span * (2 * (1 + attention_again) + 5)
    matrix_s = tokens * (linear + head) / (peak * rates.matrix)
    attention_s = tokens * attention / (peak * rates.attention)
    wide = spec.hidden_size + spec.intermediate_size * max(1, spec.experts_per_token)
    element = 4 if case.precision == "fp32" else 2
    bandwidth = hardware.bandwidth_bytes_per_s * rates.bandwidth
    traffic_s = tokens * spec.layers * wide * element * rates.traffic * (1 + 0.4 * recomputes) / bandwidth
    if case.loss_kind == "full":
        traffic_s += tokens * spec.vocab_size * 40 * target_share / bandwidth
    unpack_s = 0.0
    if case.weights in ("nf4", "int8"):
        unpack_s = spec.linear_parameters * _DEQUANTISED_BYTES * (2 + recomputes) / bandwidth
    compute_s = matrix_s + attention_s + traffic_s + unpack_s
    launch_s = rates.launch_s * (1 + 0.6 * min(1.0, recomputes)) + (_UNPACK_LAUNCH_S if unpack_s else 0)
    return max(compute_s, launch_s * spec.layers if hardware.kind == "cuda" else 0.0)
