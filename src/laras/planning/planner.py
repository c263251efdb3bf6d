"""The fastest settings that fit the device, and why; the optimisation itself stays as the user set it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

from laras.config import RunConfig
from laras.planning.memory import (
    CONTEXT_BYTES,
    MemoryCase,
    Weights,
    adapted_layers,
    estimate_memory,
    lora_parameters,
)
from laras.planning.throughput import estimate_step_s
from laras.records import (
    Alternative,
    DatasetProfile,
    HardwareSpec,
    MemoryEstimate,
    ModelSpec,
    Optim,
    PlanChoices,
    Precision,
    SplitManifest,
    TimeEstimate,
    TrainPlan,
    digest_of,
)

# Largest size below which a rank holds, in parameters.
_RANKS = ((0.75e9, 8), (4e9, 16), (float("inf"), 32))
_RSLORA_FROM = 3e9
_GIB = 2**30


@dataclass(frozen=True)
class _Candidate:
    case: MemoryCase
    memory: MemoryEstimate
    tokens_per_s: float

    @property
    def fits(self) -> bool:
        evaluation = self.memory.eval_peak_allocated_bytes
        return max(self.memory.train_peak_reserved_bytes, evaluation) <= self.memory.device_budget_bytes


def plan_training(
    config: RunConfig,
    profile: DatasetProfile | None,
    manifest: SplitManifest | None,
    spec: ModelSpec,
    hardware: HardwareSpec,
) -> TrainPlan:
    """Resolves every `auto` of the configuration for this model, data and device.

    Args:
        config: What the user wants; given values are respected.
        profile: What the data is; None assumes that every example has `max_length` tokens.
        manifest: How the rows were divided; None assumes one optimizer step an epoch.
        spec: The architecture.
        hardware: The device.

    Returns:
        The plan; `fits` is False, with `remedies`, when nothing that the configuration allows fits.
    """
    reasons: dict[str, str] = {}
    precision = _precision(config, hardware, reasons)
    length = _length(config, profile, spec, reasons)
    candidates = _candidates(config, spec, hardware, precision, length)
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        best = max(fitting, key=lambda c: (c.tokens_per_s, -c.memory.train_peak_allocated_bytes))
    else:
        best = min(candidates, key=lambda c: c.memory.train_peak_reserved_bytes)
    rows = manifest.train.rows if manifest else config.effective_batch_size
    epochs_steps = ceil(ceil(rows / config.effective_batch_size) * config.num_train_epochs)
    steps = config.max_steps or max(1, epochs_steps)
    choices = _choices(config, spec, best, steps, reasons)
    tokens = steps * config.effective_batch_size * length
    others = sorted((c for c in candidates if c is not best), key=lambda c: (not c.fits, -c.tokens_per_s))
    return TrainPlan(
        parent_digest=manifest.digest() if manifest else None,
        config_digest=digest_of(config.model_dump(mode="json")),
        model=spec,
        hardware=hardware,
        choices=choices,
        reasons=reasons,
        memory=best.memory,
        time=TimeEstimate(tokens_per_s=best.tokens_per_s, steps=steps, total_s=tokens / best.tokens_per_s),
        total_steps=steps,
        fits=best.fits,
        alternatives=tuple(_alternative(candidate) for candidate in others[:5]),
        remedies=() if best.fits else _remedies(config, best, length),
        warnings=() if best.fits else (f"needs {_gib(best.memory.train_peak_reserved_bytes)} of memory",),
    )


def _precision(config: RunConfig, hardware: HardwareSpec, reasons: dict[str, str]) -> Precision:
    if config.precision != "auto":
        reasons["precision"] = "as configured"
        return config.precision
    if hardware.kind == "cpu":
        reasons["precision"] = "fp32: a CPU gains nothing from half precision"
        return "fp32"
    if hardware.native_bf16:
        reasons["precision"] = f"bf16: {hardware.gpu_name} computes it natively"
        return "bf16"
    reasons["precision"] = f"fp16 with a gradient scaler: {hardware.gpu_name} only emulates bf16"
    return "fp16"


def _length(config: RunConfig, profile: DatasetProfile | None, spec: ModelSpec, reasons: dict[str, str]) -> int:
    cap = min(config.max_length, spec.max_position_embeddings)
    longest = profile.tokens.max if profile and profile.tokens.max else cap
    length = min(cap, -(-longest // 8) * 8)
    reasons["max_length"] = f"{length}: the longest example, in eights, at most {cap}"
    return length


def _candidates(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, precision: Precision, length: int
) -> list[_Candidate]:
    """Every combination that the configuration leaves open."""
    cuda, full = hardware.kind == "cuda", config.finetuning_type == "full"
    effective = config.effective_batch_size
    batches = _given(config.per_device_train_batch_size, [n for n in range(1, effective + 1) if effective % n == 0])
    if config.gradient_accumulation_steps != "auto" and config.per_device_train_batch_size == "auto":
        batches = [max(1, effective // config.gradient_accumulation_steps)]
    four_bit = _given(config.load_in_4bit, [False, True] if cuda and not full and not config.load_in_8bit else [False])
    optim: Optim = config.optim if config.optim != "auto" else ("adamw_torch_fused" if cuda else "adamw_torch")
    free = hardware.total_bytes - hardware.other_processes_bytes
    budget = max(0, int(free * config.memory_budget_fraction) - (CONTEXT_BYTES if cuda else 0))
    found = []
    for micro, checkpointing, quantised in product(
        batches, _given(config.gradient_checkpointing, [False, True]), four_bit
    ):
        weights: Weights = "nf4" if quantised else "int8" if config.load_in_8bit else precision
        case = MemoryCase(
            micro_batch=micro,
            length_tokens=length,
            eval_batch=_given(config.per_device_eval_batch_size, [micro])[0],
            checkpointing=checkpointing,
            full=full,
            weights=weights,
            precision=precision,
            optim=optim,
            loss_kind="full" if config.loss_kind == "auto" else config.loss_kind,
            lora_r=_rank(config, spec),
            target_modules=_targets(config, spec),
            keeps_gradients=micro < effective,
        )
        memory = estimate_memory(spec, case, hardware, budget)
        found.append(_Candidate(case, memory, micro * length / estimate_step_s(spec, case, hardware)))
    return found


def _choices(config: RunConfig, spec: ModelSpec, best: _Candidate, steps: int, reasons: dict[str, str]) -> PlanChoices:
    case = best.case
    rank = case.lora_r
    size = f"{spec.total_parameters / 1e9:.2f}B parameters"
    rslora = spec.total_parameters > _RSLORA_FROM if config.use_rslora == "auto" else config.use_rslora
    trained = spec.total_parameters if case.full else lora_parameters(spec, rank, case.target_modules)
    evaluate = _given(config.eval_steps, [max(1, min(100, steps // 10))])[0]
    verdict = "the fastest that fits" if best.fits else "the smallest that the configuration allows"
    for name, given in (
        ("per_device_train_batch_size", config.per_device_train_batch_size),
        ("gradient_checkpointing", config.gradient_checkpointing),
        ("load_in_4bit", config.load_in_4bit),
    ):
        reasons[name] = verdict if given == "auto" else "as configured"
    reasons["lora_r"] = f"for {size}" if config.lora_r == "auto" else "as configured"
    reasons["use_rslora"] = f"from 3B on; {size}" if config.use_rslora == "auto" else "as configured"
    reasons["packing"] = "off: the padded path runs everywhere" if config.packing == "auto" else "as configured"
    return PlanChoices(
        per_device_train_batch_size=case.micro_batch,
        per_device_eval_batch_size=case.eval_batch,
        gradient_accumulation_steps=config.effective_batch_size // case.micro_batch
        if config.gradient_accumulation_steps == "auto"
        else config.gradient_accumulation_steps,
        gradient_checkpointing=case.checkpointing,
        packing=config.packing is True,
        max_length=case.length_tokens,
        finetuning_type=config.finetuning_type,
        load_in_4bit=case.weights == "nf4",
        load_in_8bit=config.load_in_8bit,
        precision=case.precision,
        optim=case.optim,
        backend="transformers" if config.backend == "auto" else config.backend,
        attention="sdpa" if config.attn_implementation == "auto" else config.attn_implementation,
        loss_kind=case.loss_kind,
        lora_r=rank,
        lora_alpha=2.0 * rank if config.lora_alpha == "auto" else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=rslora,
        use_dora=config.use_dora,
        target_modules=case.target_modules,
        trainable_parameters=trained,
        total_parameters=spec.total_parameters + (0 if case.full else trained),
        learning_rate=_given(config.learning_rate, [2e-5 if case.full else 2e-4])[0],
        eval_steps=evaluate,
        save_steps=_given(config.save_steps, [evaluate])[0],
        logging_steps=config.logging_steps,
    )


def _given(value: Any, otherwise: list[Any]) -> list[Any]:
    """The value alone when the user gave one, else what is open."""
    return otherwise if value == "auto" else [value]


def _rank(config: RunConfig, spec: ModelSpec) -> int:
    if config.lora_r != "auto":
        return config.lora_r
    return next(rank for limit, rank in _RANKS if spec.total_parameters < limit)


def _targets(config: RunConfig, spec: ModelSpec) -> tuple[str, ...]:
    if isinstance(config.lora_target_modules, tuple):
        return config.lora_target_modules
    return tuple(dict.fromkeys(name for name, _, _ in adapted_layers(spec, ())))


def _alternative(candidate: _Candidate) -> Alternative:
    case = candidate.case
    return Alternative(
        per_device_train_batch_size=case.micro_batch,
        gradient_checkpointing=case.checkpointing,
        packing=False,
        load_in_4bit=case.weights == "nf4",
        loss_kind=case.loss_kind,
        train_peak_allocated_bytes=candidate.memory.train_peak_allocated_bytes,
        tokens_per_s=candidate.tokens_per_s,
        fits=candidate.fits,
    )


def _remedies(config: RunConfig, best: _Candidate, length: int) -> tuple[str, ...]:
    needed, budget = best.memory.train_peak_reserved_bytes, best.memory.device_budget_bytes
    remedies = [f"a device with {_gib(needed - budget)} more memory"]
    if length > 256:
        remedies.append(f"max_length: {length // 2}")
    if config.load_in_4bit is False and config.finetuning_type == "lora":
        remedies.append("load_in_4bit: auto")
    if config.gradient_checkpointing is False:
        remedies.append("gradient_checkpointing: auto")
    if config.finetuning_type == "full":
        remedies.append("finetuning_type: lora")
    return tuple(remedies)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"
