"""Duration of a training step: what the device computes and moves, or what the CPU issues, whichever takes longer.

Two ways to the same sum, with the same six constants. `recorded_step_s` adds up the operations of a simulated step,
each by its own shape; `estimate_step_s` ranks candidates that were not simulated, from the sizes of the architecture
and the number of operations that a layer of each path was counted to have.

Source: fitted on an H100, `python benchmarks/step_time.py`, where cases that were left out of the fit are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from laras.planning.memory import MemoryCase, adapted_layers, linear_layers
from laras.planning.work import Work
from laras.records import HardwareSpec, ModelSpec


@dataclass(frozen=True)
class Rates:
    """What a GPU and its host reach; no constant of an architecture.

    Attributes:
        matrix: Share of the dense peak that matrix products reach.
        attention: That of the attention kernels.
        attention_start: Tokens that a token seems to attend to besides those it does: blocks that are filled in part.
        bandwidth: Share of the memory bandwidth that everything else reaches.
        kernel_s: Seconds between two kernels on the device.
        call_s: Seconds that Python takes for an operation, views included, where autograd does not follow.
        graph_s: Seconds where it does, with the modules around.
        engine_s: Seconds that autograd's engine takes for one.
        launch_s: Seconds more where the operation launches a kernel.
        compiled_s: Seconds more where a compiler's launcher does it.
    """

    matrix: float
    attention: float
    attention_start: float
    bandwidth: float
    kernel_s: float
    call_s: float
    graph_s: float
    engine_s: float
    launch_s: float
    compiled_s: float


RATES = Rates(
    matrix=0.70, attention=0.30, attention_start=500, bandwidth=0.80, kernel_s=3e-6,
    call_s=3e-6, graph_s=10e-6, engine_s=8e-6, launch_s=18e-6, compiled_s=20e-6,
)  # fmt: skip
# Once a step, however many micro-batches: the adapters' copies, the update, the gradients' release.
_FIRST, _LAST = ("states", "batch"), ("optimizer", "release")
_EACH = ("forward", "loss", "backward", "end")
_AGAIN = " again"  # of a second micro-batch


def recorded_step_s(
    work: Mapping[str, Work],
    hardware: HardwareSpec,
    rates: Rates = RATES,
    *,
    span_tokens: float,
    target_share: float = 1.0,
    token_share: float = 1.0,
    accumulation: int = 1,
) -> float:
    """Seconds of one micro-batch with its part of the optimizer's step.

    The host issues one part of the step after the other, and does not wait for the device before the end; the device
    does not begin a part before it is issued. So one of them may be ahead in forward, and behind in backward.

    Args:
        work: Of a recorded step, by kind of segment.
        hardware: The device.
        rates: What it reaches.
        span_tokens: Mean length of what a token attends within.
        target_share: Share of the tokens that carry loss; the step was recorded with all.
        token_share: Tokens of an average batch over those of the recorded one.
        accumulation: Micro-batches of an optimizer step.
    """
    parts = [work[kind] for kind in _order(work, accumulation)]
    shares = [
        (1.0 if kind in _FIRST + _LAST else token_share) * (target_share if kind.startswith("loss") else 1.0)
        for kind in _order(work, accumulation)
    ]
    issued_s = done_s = 0.0
    for part, share in zip(parts, shares, strict=True):
        kernels = part.kernels + sum(count for _, count in part.products)
        began_s = max(done_s, issued_s)
        issued_s += part.calls * rates.call_s + part.graph_calls * rates.graph_s + part.engine_calls * rates.engine_s
        issued_s += kernels * rates.launch_s + part.compiled * rates.compiled_s
        busy_s = share * _busy_s(part, hardware, rates, span_tokens) + kernels * rates.kernel_s
        done_s = max(began_s + busy_s, issued_s)
    return done_s / accumulation


def _order(work: Mapping[str, Work], accumulation: int) -> list[str]:
    """The kinds of segments in the order of time, those of every micro-batch."""
    later = [kind + _AGAIN if kind + _AGAIN in work else kind for kind in _EACH]
    order = [*_FIRST, *_EACH]
    for _ in range(accumulation - 1):
        order += ["batch" + _AGAIN, *later]
    return [kind for kind in (*order, *_LAST) if kind in work]


def _busy_s(part: Work, hardware: HardwareSpec, rates: Rates, span_tokens: float) -> float:
    """Seconds that the device computes or moves."""
    attention = sum(
        tokens * heads * channels * products * count for (tokens, heads, channels, products), count in part.attention
    )
    busy_s = _products_s(part, hardware, rates)
    busy_s += attention * (span_tokens + rates.attention_start) / (_peak(hardware, 2) * rates.attention)
    busy_s += part.moved_bytes / (hardware.bandwidth_bytes_per_s * rates.bandwidth)
    copies_s = part.copied_bytes / hardware.host_link_bytes_per_s
    return max(busy_s + _COPY_LOSS * copies_s, copies_s)


def _products_s(part: Work, hardware: HardwareSpec, rates: Rates) -> float:
    """Each product by its arithmetic or by its operands, whichever takes longer."""
    total = 0.0
    bandwidth = hardware.bandwidth_bytes_per_s * rates.bandwidth
    for (rows, inner, columns, size), count in part.products:
        arithmetic_s = 2 * rows * inner * columns / (_peak(hardware, size) * rates.matrix)
        operands = size * (rows * inner + inner * columns + rows * columns)
        total += count * max(arithmetic_s, operands / bandwidth)
    return total


def _peak(hardware: HardwareSpec, element_bytes: int) -> float:
    """Operations a second for elements of that size."""
    half = hardware.peak_flops["bf16"] if hardware.native_bf16 else hardware.peak_flops["fp16"]
    return hardware.peak_flops["fp32"] if element_bytes == 4 else half


@dataclass(frozen=True)
class _Path:
    """Operations of one layer, forward and backward, as simulated steps were counted to have.

    Attributes:
        calls: Operations that the host issues.
        kernels: Those that launch a kernel.
        traffic: Hidden- and feed-forward-sized tensors that its kernels read or write, matrix products apart.
        again: Share that comes on top where the layer is computed again.
    """

    calls: int
    kernels: int
    traffic: float
    again: float


_FUSED = _Path(calls=224, kernels=52, traffic=10.5, again=0.26)
_LINEAR = _Path(calls=56, kernels=30, traffic=12.0, again=0.50)  # of transformers' layers, for each linear layer
_FULL_SHARE, _FP32_SHARE = 0.56, 0.72  # of that, without adapters, and without autocast
_CHUNK_CALLS, _CHUNK_KERNELS = 101, 33  # of a checkpointed fused layer, for every chunk of its MLP but the first
_STEP_CALLS, _STEP_KERNELS = 92, 21  # of a layer once a step: copies of the adapters, update
_UPDATE_8BIT_CALLS = 280
_UNPACK_CALLS, _UNPACK_KERNELS, _UNPACK_BYTES = 60, 24, 6.0  # of a layer, each time its 4-bit weights are unpacked
COPY_CALLS = 8  # of a copy to main memory or back, with what keeps the streams in order
# Share of a copy's time that what runs beside it loses. Source: one pair of runs on an H100, 343 and 348 ms.
_COPY_LOSS = 0.07
_LOGIT_BYTES = {"full": 64, "chunked": 6.3}  # moved for every logit
_CPU_TRAFFIC, _CPU_BANDWIDTH = 20.0, 0.5


def estimate_step_s(
    spec: ModelSpec,
    case: MemoryCase,
    hardware: HardwareSpec,
    *,
    attended_tokens: float | None = None,
    target_share: float = 1.0,
    accumulation: int = 1,
) -> float:
    """Seconds of one micro-batch, forward and backward, with its part of the optimizer's step.

    Args:
        spec: The architecture.
        case: The micro-batch and its path.
        hardware: The device.
        attended_tokens: Mean length of what a token attends within; None is the case's length.
        target_share: Share of the tokens that carry loss; logits of others are not computed.
        accumulation: Micro-batches of an optimizer step.
    """
    tokens = case.micro_batch * case.length_tokens
    selective = case.checkpointing and case.fused and case.checkpoint_kind == "selective"
    recomputed = 0.0 if not case.checkpointing else 0.65 if selective else 1.0
    span = attended_tokens if attended_tokens is not None else case.length_tokens
    attention_again = 1 if case.checkpointing and not selective else 0
    # Causal: half of the square; backward has five products to forward's two.
    attention = spec.layers * spec.attention_heads * spec.head_dim * span * (2 * (1 + attention_again) + 5)
    linear, head = _operations(spec, case, recomputed)
    arithmetic = tokens * (linear + head * target_share)
    peak = hardware.peak_flops[case.precision]
    wide = spec.hidden_size + spec.intermediate_size * max(1, spec.experts_per_token)
    element = 4 if case.precision == "fp32" else 2
    logits = tokens * spec.vocab_size * target_share * _LOGIT_BYTES[case.loss_kind]
    if hardware.kind == "cpu":
        moved = tokens * spec.layers * wide * element * _CPU_TRAFFIC * (1 + 0.4 * recomputed) + logits
        return (arithmetic + tokens * attention) / peak + moved / (_CPU_BANDWIDTH * hardware.bandwidth_bytes_per_s)
    path = _FUSED if case.fused else _plain_path(spec, case)
    moved = tokens * spec.layers * wide * element * path.traffic * (1 + path.again * recomputed) + logits
    offloads = case.checkpointing and case.fused and case.checkpoint_kind == "offload"
    copied = tokens * (spec.layers - 1) * spec.hidden_size * element if offloads else 0
    moved += 2 * copied
    calls, kernels = _issued(case, path, recomputed, accumulation)
    if case.weights in ("nf4", "int8"):
        moved += spec.linear_parameters * _UNPACK_BYTES * (2 + recomputed)
    rates = RATES
    device_s = arithmetic / (peak * rates.matrix) + tokens * attention / (peak * rates.attention)
    device_s += moved / (hardware.bandwidth_bytes_per_s * rates.bandwidth) + spec.layers * kernels * rates.kernel_s
    # Inputs leave beside the forward pass and come back beside the rest, which takes twice as long with it done again.
    copies_s = copied / hardware.host_link_bytes_per_s
    device_s += 2 * _COPY_LOSS * copies_s
    device_s += max(0.0, copies_s - device_s / 3) + max(0.0, copies_s - device_s * 2 / 3)
    return max(device_s, spec.layers * (calls * rates.call_s + kernels * rates.launch_s))


def _plain_path(spec: ModelSpec, case: MemoryCase) -> _Path:
    share = (_FULL_SHARE if case.full else 1.0) * (_FP32_SHARE if case.precision == "fp32" else 1.0)
    share *= len(linear_layers(spec)) + 1
    return _Path(round(share * _LINEAR.calls), round(share * _LINEAR.kernels), share * _LINEAR.traffic, _LINEAR.again)


def _operations(spec: ModelSpec, case: MemoryCase, recomputed: float) -> tuple[float, float]:
    """Of a token's linear layers and adapters, and of its logits."""
    share = spec.experts_per_token / spec.experts if spec.experts else 1.0
    # Two operations a weight forward, two for the inputs' gradients, two more for the weights' when they train.
    linear = 2 * spec.linear_parameters * share * ((3 if case.full else 2) + recomputed)
    if not case.full:
        adapters = sum(inputs + outputs for _, inputs, outputs in adapted_layers(spec, case.target_modules))
        linear += 2 * spec.layers * case.lora_r * adapters * (3 + recomputed)
    return linear, 2 * spec.vocab_size * spec.hidden_size * (3 if case.full else 2)


def _issued(case: MemoryCase, path: _Path, recomputed: float, accumulation: int) -> tuple[float, float]:
    """Calls and kernels of a layer in one micro-batch."""
    calls, kernels = (count * (1 + path.again * recomputed) for count in (path.calls, path.kernels))
    chunks = 1
    if case.fused and case.checkpointing:
        chunks = -(-case.micro_batch * case.length_tokens // case.mlp_chunk_tokens)
        calls += (chunks - 1) * _CHUNK_CALLS
        kernels += (chunks - 1) * _CHUNK_KERNELS
        if case.checkpoint_kind == "offload":
            calls += 2 * COPY_CALLS
            kernels += 2
    if case.weights in ("nf4", "int8"):
        calls += _UNPACK_CALLS * (2 + recomputed)
        kernels += _UNPACK_KERNELS * (2 + recomputed)
    once = _STEP_CALLS + (_UPDATE_8BIT_CALLS if case.optim.endswith("8bit") else 0)
    return calls + once / accumulation, kernels + _STEP_KERNELS / accumulation
