"""Every combination of settings that the configuration leaves open, with its memory and speed in closed form."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from operator import itemgetter
from typing import Any

from laras.config import RunConfig
from laras.planning.architecture import FAMILIES
from laras.planning.fused_memory import FUSED_TYPES
from laras.planning.memory import (
    MemoryCase,
    Weights,
    adapted_layers,
    context_bytes,
    estimate_memory,
)
from laras.planning.throughput import estimate_step_s, on_busy_host
from laras.planning.workload import Workload
from laras.records import CheckpointKind, HardwareSpec, LossKind, MemoryEstimate, ModelSpec, Optim, Precision

# Architectures whose logits are one plain product, so that the loss can be computed in parts; those of
# `laras.models.heads`, which a test compares.
PLAIN_HEAD_TYPES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "gemma", "smollm3", "olmo2"}
)
# Architectures that keep packed documents apart: every layer attends through transformers' registry of attention
# functions, and nothing else reaches over positions. A test compares each with its documents alone. State-space,
# convolutional and linear-attention layers carry one document into the next.
PACKABLE_TYPES = frozenset(
    {
        "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text",
        "glm", "glm4", "gpt_neox", "granite", "helium", "llama", "ministral3", "mistral", "mixtral", "olmo", "olmo2",
        "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "starcoder2",
    }
)  # fmt: skip
LOSS_CHUNK_TOKENS = 1024
_MOST_TOKENS = 2**22  # in a micro-batch of several rows: beyond it nothing gets faster on any device
_VARLEN_CAPABILITY, _VARLEN_CHANNELS = (8, 0), 256
# Of the main memory that is free, what inputs of layers may take: it cannot be swapped while the run lasts.
HOST_SHARE = 0.5
# What a GiB of it is worth, as a share of the speed: a larger micro-batch gains little, and other programs lose memory.
_HOST_PRICE = 0.002
_MULTIPLES, _ROUNDED_TO = (128, 64, 16), 50  # of the tokens of a bin: the largest of which it has so many
# Largest shares by which packing may change the tokens of an optimizer step: wanted, and at all.
EFFECTIVE_SLACKS = (0.05, 0.15)
_EVAL_BATCHES = (16, 8, 4, 2, 1)
_RANKS = ((0.75e9, 8), (4e9, 16), (float("inf"), 32))
# Of the free memory, where nothing is said: what a plan may use of a GPU, of one of several (buffers of NCCL are not
# counted), and of main memory, where predictions are up to 14% too low. On a GPU what is left is for errors of the
# prediction (docs/concepts/memory.md) and for others: so much in any case, and a share of what others hold now.
_GPU_SHARE, _SEVERAL_SHARE, _CPU_SHARE = 0.98, 0.95, 0.9
_LEAST_FREE_BYTES, _OTHERS_GROW = 256 * 2**20, 0.25


@dataclass(frozen=True)
class Split:
    """How an optimizer step is divided.

    Attributes:
        micro: Rows of a micro-batch.
        accumulation: Micro-batches of the step.
        bin_tokens: Slots of a packed micro-batch, whatever its rows; None where rows are padded.
    """

    micro: int
    accumulation: int
    bin_tokens: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        case: What decides its memory.
        accumulation: Micro-batches of an optimizer step.
        memory: Predicted in closed form, until simulated.
        tokens_per_s: Useful tokens, padding left out.
        busy_tokens_per_s: The same on a host with other work, by which candidates are compared.
        fits: By its memory estimate.
        replayed: The step is a CUDA graph.
        replay_gain: Share of the time that it saves, or would save; None before a simulation.
    """

    case: MemoryCase
    accumulation: int
    memory: MemoryEstimate
    tokens_per_s: float
    busy_tokens_per_s: float
    fits: bool
    replayed: bool = False
    replay_gain: float | None = None

    @property
    def packing(self) -> bool:
        """Micro-batches are packed bins."""
        return self.case.bin_tokens is not None

    @property
    def quantised(self) -> bool:
        """Weights are stored in fewer bits than they compute in."""
        return self.case.weights in ("nf4", "int8")

    @property
    def worth(self) -> float:
        """The speed, less what the main memory is worth that it takes."""
        return self.busy_tokens_per_s * (1 - _HOST_PRICE * self.memory.host_bytes / 2**30)

    def is_as_exact_as(self, other: Candidate) -> bool:
        """Whether both keep weights and optimizer states in as many bits."""
        return self.preference()[:2] == other.preference()[:2]

    def at_speed(self, times_as_fast: float) -> Candidate:
        """The same, so many times as fast."""
        free, busy = times_as_fast * self.tokens_per_s, times_as_fast * self.busy_tokens_per_s
        return replace(self, tokens_per_s=free, busy_tokens_per_s=busy)

    def preference(self) -> tuple[bool, bool, float, int]:
        """Sorts the best first: full precision, then exact optimizer states, then worth, then memory."""
        peak = self.memory.train_peak_allocated_bytes
        return self.quantised, self.case.optim.endswith("8bit"), -self.worth, peak


def candidates(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, precision: Precision, work: Workload
) -> list[Candidate]:
    """Every combination; the best first."""
    budget = device_budget_bytes(config, hardware)
    found = []
    for packing in packing_options(config, spec, hardware, precision, work):
        for split in _shared_out(_splits(config, work, packing)):
            for weights, optim, kind in product(
                _weights(config, hardware, precision), _optims(config, hardware), _checkpoint_kinds(config, hardware)
            ):
                case = _case(config, spec, hardware, precision, work, split, weights, optim, kind)
                if kind in ("selective", "offload") and not case.fused:
                    continue
                one = _evaluated(config, spec, hardware, work, case, split.accumulation, budget)
                if one.memory.host_bytes <= host_budget_bytes(hardware):
                    found.append(one)
    return sorted(found, key=Candidate.preference)


def device_budget_bytes(config: RunConfig, hardware: HardwareSpec) -> int:
    """What a run may reserve: the wanted share of the free memory, without the CUDA context."""
    free, others = hardware.total_bytes - hardware.other_processes_bytes, hardware.other_processes_bytes
    if config.memory_budget_fraction != "auto":
        usable = free * config.memory_budget_fraction
    elif hardware.kind == "cpu":
        usable = free * _CPU_SHARE
    else:
        share = _GPU_SHARE if hardware.count == 1 else _SEVERAL_SHARE
        usable = min(share * free, free - _LEAST_FREE_BYTES) - _OTHERS_GROW * others
    return max(0, int(usable) - context_bytes(hardware))


def host_budget_bytes(hardware: HardwareSpec) -> float:
    """What a run may pin of the main memory; infinite where the machine is not known."""
    available = hardware.host_available_bytes
    return float("inf") if available is None else HOST_SHARE * available


def packing_options(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, precision: Precision, work: Workload
) -> list[bool]:
    """Whether documents are packed; one value unless nothing was said and both are possible."""
    if config.packing != "auto":
        return [config.packing]
    return [packing_refusal(config, spec, hardware, precision, work) is None]


def packing_refusal(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, precision: Precision, work: Workload
) -> str | None:
    """Why packing is not chosen by itself, in one line; None when it is."""
    if spec.model_type not in PACKABLE_TYPES:
        return f"{spec.model_type} is not known to keep packed documents apart"
    if (refusal := _varlen_refusal(spec, hardware, precision)) is not None:
        return refusal
    if config.attn_implementation not in ("auto", "varlen", "sdpa"):
        return f"attn_implementation {config.attn_implementation} is not known to keep documents apart"
    if not _packed_splits(config, work):
        _, nearest = min(_bins(config, work), key=itemgetter(0))
        return (
            f"a step would be {nearest.accumulation} x {nearest.bin_tokens} tokens, as bins hold the longest example, "
            f"and {config.effective_batch_size} average ones are {work.step_tokens:.0f}"
        )
    return None


def _varlen_refusal(spec: ModelSpec, hardware: HardwareSpec, precision: Precision) -> str | None:
    if hardware.kind == "cpu":
        return "attention over packed documents is slow on a CPU"
    if (hardware.compute_capability or (0, 0)) < _VARLEN_CAPABILITY or precision == "fp32":
        return "its attention kernel needs half precision and compute capability 8.0"
    if spec.head_dim > _VARLEN_CHANNELS:
        return f"its attention kernel takes heads of at most {_VARLEN_CHANNELS} channels, not {spec.head_dim}"
    return None


def fused_possible(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, precision: Precision, length_tokens: int
) -> bool:
    """Whether the fused layers run; what `laras.models.fused.model.fused_refusal` finds on the built model."""
    if config.backend == "unsloth" or config.finetuning_type != "lora":
        return False
    if spec.model_type not in FUSED_TYPES or config.loss_kind == "full":
        return False
    if spec.fused_refusal is not None or length_tokens > (spec.fused_longest_tokens or length_tokens):
        return False
    if config.lora_dropout or config.use_dora or config.load_in_8bit:
        return False
    if len(adapted_layers(spec, targets_of(config, spec))) < len(adapted_layers(spec, ())):
        return False
    capability = hardware.compute_capability or (0, 0)
    return hardware.kind == "cpu" or (capability >= _VARLEN_CAPABILITY and precision == "bf16")


def rank_of(config: RunConfig, spec: ModelSpec) -> int:
    """Rank of the adapters: given, or by the size of the model."""
    if config.lora_r != "auto":
        return config.lora_r
    return next(rank for limit, rank in _RANKS if spec.total_parameters < limit)


def targets_of(config: RunConfig, spec: ModelSpec) -> tuple[str, ...]:
    """Names of the linear layers that get adapters; of a family that is not known, all that the built model has."""
    if isinstance(config.lora_target_modules, tuple):
        return config.lora_target_modules
    if spec.model_type not in FAMILIES:
        return ("all-linear",)
    return tuple(dict.fromkeys(name for name, _, _ in adapted_layers(spec, ())))


def _case(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    precision: Precision,
    work: Workload,
    split: Split,
    weights: Weights,
    optim: Optim,
    kind: CheckpointKind,
) -> MemoryCase:
    full = config.finetuning_type == "full"
    plain_head = spec.model_type in PLAIN_HEAD_TYPES
    loss: LossKind = "chunked" if plain_head and not full else "full"
    return MemoryCase(
        micro_batch=split.micro,
        length_tokens=work.length_tokens,
        bin_tokens=split.bin_tokens,
        eval_batch=1,
        checkpointing=kind != "none",
        full=full,
        weights=weights,
        precision=precision,
        adapters="compute" if precision == "fp32" else "fp32-autocast",
        optim=optim,
        loss_kind=loss if config.loss_kind == "auto" else config.loss_kind,
        lora_r=rank_of(config, spec),
        target_modules=targets_of(config, spec),
        keeps_gradients=split.accumulation > 1,
        fused=fused_possible(config, spec, hardware, precision, work.length_tokens),
        checkpoint_kind=kind,
        loss_chunk_tokens=LOSS_CHUNK_TOKENS if plain_head else 0,
        dora=config.use_dora,
        dropout=config.lora_dropout > 0,
    )


def _evaluated(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    work: Workload,
    case: MemoryCase,
    accumulation: int,
    budget: int,
) -> Candidate:
    if config.per_device_eval_batch_size != "auto":
        case = replace(case, eval_batch=config.per_device_eval_batch_size)
    else:
        for rows in _EVAL_BATCHES:
            case = replace(case, eval_batch=rows)
            memory = estimate_memory(spec, case, hardware, budget)
            if memory.eval_peak_allocated_bytes <= 0.9 * min(memory.train_peak_allocated_bytes, budget):
                break
    memory = estimate_memory(spec, case, hardware, budget)
    fits = max(memory.train_peak_reserved_bytes, memory.eval_peak_allocated_bytes) <= budget
    free, busy = (_rate(spec, case, one, work, accumulation) for one in (hardware, on_busy_host(hardware)))
    return Candidate(case, accumulation, memory, free, busy, fits)


def _rate(spec: ModelSpec, case: MemoryCase, hardware: HardwareSpec, work: Workload, accumulation: int) -> float:
    """Useful tokens a second."""
    if case.bin_tokens is not None:
        step_s = estimate_step_s(
            spec,
            case,
            hardware,
            attended_tokens=work.attended_tokens,
            target_share=work.target_share,
            accumulation=accumulation,
        )
    else:
        expected = replace(case, length_tokens=work.expected_longest(case.micro_batch))
        step_s = estimate_step_s(spec, expected, hardware, target_share=work.target_share, accumulation=accumulation)
    return work.useful_tokens(case.micro_batch, case.bin_tokens) / step_s


def _splits(config: RunConfig, work: Workload, packing: bool) -> Iterator[Split]:
    """Every split of the effective batch."""
    effective, length = config.effective_batch_size, work.length_tokens
    if packing:
        # Where none keeps the effective batch, packing is forced: the nearest.
        yield from _packed_splits(config, work) or [min(_bins(config, work), key=itemgetter(0))[1]]
        return
    micro_given, accumulation_given = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if micro_given != "auto":
        yield Split(micro_given, effective // micro_given if accumulation_given == "auto" else accumulation_given)
    elif accumulation_given != "auto":
        yield Split(max(1, effective // accumulation_given), accumulation_given)
    else:
        most = max(1, _MOST_TOKENS // length)
        yield from (
            Split(micro, effective // micro) for micro in range(1, min(effective, most) + 1) if effective % micro == 0
        )


def _shared_out(splits: Iterable[Split]) -> list[Split]:
    """The splits that give every process as many micro-batches, if there are any: else one waits for the others."""
    found, processes = list(splits), int(os.environ.get("WORLD_SIZE", "1"))
    return [one for one in found if one.accumulation % processes == 0] or found


def _packed_splits(config: RunConfig, work: Workload) -> list[Split]:
    """Bins that keep the tokens of an optimizer step, as nearly as there are any."""
    found = list(_bins(config, work))
    near = ([split for change, split in found if change <= slack] for slack in EFFECTIVE_SLACKS)
    return next((splits for splits in near if splits), [])


def _bins(config: RunConfig, work: Workload) -> Iterator[tuple[float, Split]]:
    """Bins of a number of rows where one is given, or the lengths are not known; else of what makes a step whole.

    Before each the share by which it changes the tokens of an optimizer step.
    """
    length, accumulation_given = work.length_tokens, config.gradient_accumulation_steps
    if config.per_device_train_batch_size != "auto" or work.stats is None:
        most = max(1, int(min(_MOST_TOKENS, work.step_tokens * (1 + EFFECTIVE_SLACKS[-1])) / length))
        for rows in _given(config.per_device_train_batch_size, _thinned(most)):
            bin_tokens = rows * length
            useful = work.useful_tokens(rows, bin_tokens)
            accumulation = _given(accumulation_given, [max(1, round(work.step_tokens / useful))])[0]
            yield abs(accumulation * useful / work.step_tokens - 1), Split(rows, accumulation, bin_tokens)
        return
    for accumulation in _given(accumulation_given, _thinned(max(1, ceil(work.step_tokens / length)))):
        bin_tokens = _bin_of(work, work.step_tokens / accumulation)
        useful = work.useful_tokens(1, bin_tokens)
        yield abs(accumulation * useful / work.step_tokens - 1), Split(1, accumulation, bin_tokens)


def _bin_of(work: Workload, tokens: float) -> int:
    """The bin that holds so many on average, and the longest example in any case."""
    size = _rounded(max(work.length_tokens, tokens))
    for _ in range(2):  # how full it is depends on its size
        size = _rounded(max(work.length_tokens, tokens / work.bin_fill(size)))
    return min(size, max(_MOST_TOKENS, _rounded(work.length_tokens)))


def _rounded(tokens: float) -> int:
    """Up to what matrix products like, as far as that is a small share."""
    multiple = next((one for one in _MULTIPLES if tokens >= _ROUNDED_TO * one), _MULTIPLES[-1])
    return ceil(tokens / multiple) * multiple


def _thinned(most: int) -> list[int]:
    """1 to `most`; above a few, in steps of an eighth."""
    sizes, size = [], 1
    while size <= most:
        sizes.append(size)
        size += max(1, size // 8)
    return sizes


def _weights(config: RunConfig, hardware: HardwareSpec, precision: Precision) -> list[Weights]:
    if config.load_in_8bit:
        return ["int8"]
    if config.load_in_4bit != "auto":
        return ["nf4" if config.load_in_4bit else precision]
    quantisable = hardware.kind == "cuda" and config.finetuning_type == "lora" and has_bitsandbytes()
    return [precision, "nf4"] if quantisable else [precision]


def _optims(config: RunConfig, hardware: HardwareSpec) -> list[Optim]:
    if config.optim != "auto":
        return [config.optim]
    if hardware.kind == "cpu":
        return ["adamw_torch"]
    if config.finetuning_type == "full" and has_bitsandbytes():
        return ["adamw_torch_fused", "paged_adamw_8bit"]
    return ["adamw_torch_fused"]


def _checkpoint_kinds(config: RunConfig, hardware: HardwareSpec) -> list[CheckpointKind]:
    again: list[CheckpointKind] = ["selective", "full"]
    # A CPU has no other memory to put anything into, and a graph keeps no order with such copies.
    if hardware.kind == "cuda" and config.cuda_graph is not True:
        again.append("offload")
    if config.gradient_checkpointing == "auto":
        return ["none", *again]
    return again if config.gradient_checkpointing else ["none"]


def has_bitsandbytes() -> bool:
    """Whether 4-bit weights and 8-bit optimizers can be used; found without importing it."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _given(value: Any, otherwise: list[Any]) -> list[Any]:
    """The value alone when the user gave one, else what is open."""
    return otherwise if value == "auto" else [value]
