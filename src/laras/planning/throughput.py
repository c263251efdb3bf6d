"""Duration of a training step: what the device computes and moves, and what the host issues, part by part.

Two ways to the work, one to its duration. `recorded_step_s` adds up the operations of a simulated step, each by its own
shape; `estimate_step_s` ranks candidates that were not simulated, by the operations that their path was counted to have
(`laras.planning.step_forms`).

Source: fitted on an H100 and an H200, `python benchmarks/step_time.py`, where cases that were left out of the fit are
predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from laras.planning.memory import MemoryCase, adapted_layers
from laras.planning.step_forms import closed_work
from laras.planning.work import Work
from laras.records import HardwareSpec, ModelSpec


@dataclass(frozen=True)
class Rates:
    """What a GPU and its host reach; no constant of an architecture.

    Attributes:
        matrix: Share of the dense peak that matrix products reach in half precision.
        matrix_fp32: That in fp32.
        attention: That of causal attention kernels.
        attention_masked: That of those which go through the whole square, under a mask.
        attention_start: Tokens that a token seems to attend to besides those it does: blocks that are filled in part.
        bandwidth: Share of the memory bandwidth that everything else reaches.
        kernel_s: Seconds that a kernel takes on the device besides what it computes and moves.
        gap_s: Seconds between two kernels on the device.
        view_s: Seconds that Python takes for an operation that only makes room, or another view.
        call_s: Seconds for another, with its launch, where autograd does not follow.
        graph_s: Seconds where it does, with the modules around.
        engine_s: Seconds that autograd's engine takes for an operation.
        compiled_s: Seconds more where the operation is a kernel of Triton's.
    """

    matrix: float
    matrix_fp32: float
    attention: float
    attention_masked: float
    attention_start: float
    bandwidth: float
    kernel_s: float
    gap_s: float
    view_s: float
    call_s: float
    graph_s: float
    engine_s: float
    compiled_s: float


RATES = Rates(
    matrix=0.72, matrix_fp32=0.52, attention=0.40, attention_masked=0.195, attention_start=2350,
    bandwidth=0.79, kernel_s=2.9e-6, gap_s=2.2e-6,
    view_s=5.2e-6, call_s=9.6e-6, graph_s=17.5e-6, engine_s=11.7e-6, compiled_s=43e-6,
)  # fmt: skip
# Beside another tenant a core takes up to twice as long, and a plan that the host limits loses more by it than it gains
# on a free one. Source: of 1, 1.25, 1.5 and 2, what makes the fewest wrong choices of `benchmarks/cap_grid.py` on an
# H100 and an H200.
BUSY_HOST = 1.5
# Once a step, however many micro-batches: the adapters' copies, the update, the gradients' release.
_FIRST, _LAST = ("states", "batch"), ("optimizer", "release")
_EACH = ("forward", "loss", "backward", "end")
_AGAIN = " again"  # of a second micro-batch
# Share of a copy's time that what runs beside it loses. Source: one pair of runs on an H100, 343 and 348 ms.
_COPY_LOSS = 0.07
_STEADY_AFTER = 32  # micro-batches: from then on, each takes as long as the last


def on_busy_host(hardware: HardwareSpec) -> HardwareSpec:
    """The device with a host that has other work, where plans are compared."""
    slower = max(BUSY_HOST, hardware.host_times_as_slow)
    return hardware.model_copy(update={"host_times_as_slow": slower})


def recorded_step_s(
    work: Mapping[str, Work],
    hardware: HardwareSpec,
    rates: Rates = RATES,
    *,
    span_tokens: float,
    target_share: float = 1.0,
    token_share: float = 1.0,
    accumulation: int = 1,
    is_waited_for: bool = True,
    replayed: bool = False,
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
        is_waited_for: The host waits for the step's end, as the trainer does, which looks at its loss.
        replayed: Adapters' copies, forward and backward are a CUDA graph, which the host issues at once.
    """
    seconds = {
        kind: _seconds(kind, part, hardware, rates, span_tokens, token_share, target_share)
        for kind, part in work.items()
    }
    if replayed:
        graph = {kind + again for kind in ("batch", *_EACH) for again in ("", _AGAIN)} & set(seconds)
        seconds |= {kind: (seconds[kind][0], 0.0) for kind in graph}
    if not is_waited_for:
        times = [seconds[kind] for kind in _order(work, accumulation)]
        return max(sum(busy_s for busy_s, _ in times), sum(host_s for _, host_s in times)) / accumulation
    steady = min(accumulation, _STEADY_AFTER)
    done_s = _duration(seconds, _order(work, steady))
    if accumulation > steady:
        done_s += (accumulation - steady) * (done_s - _duration(seconds, _order(work, steady - 1)))
    return done_s / accumulation


def _duration(seconds: Mapping[str, tuple[float, float]], order: list[str]) -> float:
    """From the first call to the last result, of parts that keep the device and the host busy for so long."""
    issued_s = done_s = 0.0
    for kind in order:
        busy_s, host_s = seconds[kind]
        began_s = max(done_s, issued_s)
        issued_s += host_s
        done_s = max(began_s + busy_s, issued_s)
    return done_s


def _seconds(
    kind: str,
    part: Work,
    hardware: HardwareSpec,
    rates: Rates,
    span_tokens: float,
    token_share: float,
    target_share: float,
) -> tuple[float, float]:
    """How long a part keeps the device and the host busy; one after the other where the host waits."""
    share = 1.0 if kind in _FIRST + _LAST else token_share
    if kind.startswith("loss"):
        share *= target_share
    host_s = part.views * rates.view_s + part.calls * rates.call_s + part.graph_calls * rates.graph_s
    host_s += part.engine_calls * rates.engine_s + part.compiled * rates.compiled_s
    host_s *= hardware.host_times_as_slow
    busy_s = share * _busy_s(part, hardware, rates, span_tokens, token_share)
    busy_s += _kernels(part) * (rates.kernel_s + rates.gap_s)
    return (busy_s + host_s, busy_s + host_s) if part.waits else (busy_s, host_s)


def _kernels(part: Work) -> int:
    return part.kernels + sum(count for _, count in part.products)


def _order(work: Mapping[str, Work], accumulation: int) -> list[str]:
    """The kinds of segments in the order of time, those of every micro-batch."""
    later = [kind + _AGAIN if kind + _AGAIN in work else kind for kind in _EACH]
    order = [*_FIRST, *_EACH]
    for _ in range(accumulation - 1):
        order += ["batch" + _AGAIN, *later]
    return [kind for kind in (*order, *_LAST) if kind in work]


def _busy_s(part: Work, hardware: HardwareSpec, rates: Rates, span_tokens: float, token_share: float) -> float:
    """Seconds that the device computes or moves."""
    busy_s = _products_s(part, hardware, rates)
    for (tokens, heads, channels, products, row_tokens), count in part.attention:
        attended = row_tokens * token_share if row_tokens else span_tokens + rates.attention_start
        share = rates.attention_masked if row_tokens else rates.attention
        busy_s += tokens * heads * channels * products * count * attended / (_peak(hardware, 2) * share)
    busy_s += part.moved_bytes / (hardware.bandwidth_bytes_per_s * rates.bandwidth)
    copies_s = part.copied_bytes / hardware.host_link_bytes_per_s
    return max(busy_s + _COPY_LOSS * copies_s, copies_s)


def _products_s(part: Work, hardware: HardwareSpec, rates: Rates) -> float:
    """Each product by its arithmetic or by its operands, whichever takes longer."""
    total = 0.0
    bandwidth = hardware.bandwidth_bytes_per_s * rates.bandwidth
    for (rows, inner, columns, size), count in part.products:
        share = rates.matrix_fp32 if size == 4 else rates.matrix
        arithmetic_s = 2 * rows * inner * columns / (_peak(hardware, size) * share)
        operands = size * (rows * inner + inner * columns + rows * columns)
        total += count * max(arithmetic_s, operands / bandwidth)
    return total


def _peak(hardware: HardwareSpec, element_bytes: int) -> float:
    """Operations a second for elements of that size."""
    half = hardware.peak_flops["bf16"] if hardware.native_bf16 else hardware.peak_flops["fp16"]
    return hardware.peak_flops["fp32"] if element_bytes == 4 else half


_CPU_TRAFFIC, _CPU_BANDWIDTH, _CPU_LOGIT_BYTES = 20.0, 0.5, {"full": 64, "chunked": 6.3}


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
    span = attended_tokens if attended_tokens is not None else case.length_tokens
    if hardware.kind == "cpu":
        return _on_cpu_s(spec, case, hardware, span, target_share)
    work = closed_work(spec, case)
    return recorded_step_s(work, hardware, span_tokens=span, target_share=target_share, accumulation=accumulation)


def _on_cpu_s(
    spec: ModelSpec, case: MemoryCase, hardware: HardwareSpec, span_tokens: float, target_share: float
) -> float:
    """Arithmetic at the processor's rate, then traffic at half of what main memory gives."""
    tokens, again = case.tokens, 1 if case.checkpointing else 0
    # Two operations a weight forward, two for the inputs' gradients, two more for the weights' when they train.
    share = spec.experts_per_token / spec.experts if spec.experts else 1.0
    arithmetic = 2 * spec.linear_parameters * share * ((3 if case.full else 2) + again)
    if not case.full:
        adapters = sum(inputs + outputs for _, inputs, outputs in adapted_layers(spec, case.target_modules))
        arithmetic += 2 * spec.layers * case.lora_r * adapters * (3 + again)
    arithmetic += 2 * spec.vocab_size * spec.hidden_size * (3 if case.full else 2) * target_share
    # Causal: half of the square; backward has five products to forward's two.
    arithmetic += spec.layers * spec.attention_heads * spec.head_dim * span_tokens * (2 * (1 + again) + 5)
    wide = spec.hidden_size + spec.intermediate_size * max(1, spec.experts_per_token)
    moved = spec.layers * wide * (4 if case.precision == "fp32" else 2) * _CPU_TRAFFIC * (1 + 0.4 * again)
    moved += spec.vocab_size * target_share * _CPU_LOGIT_BYTES[case.loss_kind]
    arithmetic_s = tokens * arithmetic / hardware.peak_flops[case.precision]
    return arithmetic_s + tokens * moved / (_CPU_BANDWIDTH * hardware.bandwidth_bytes_per_s)
