"""The fastest settings that fit the device, and why; the optimisation itself stays as the user set it.

The closed form ranks every combination at once. The step is then simulated for the best, and for the next where it does
not fit; whether it fits is decided by a replay of the allocator at the device's capacity.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from laras.config import RunConfig
from laras.errors import ConfigError, LarasError
from laras.planning.architecture import FAMILIES
from laras.planning.candidates import (
    LOSS_CHUNK_TOKENS,
    PACKABLE_TYPES,
    Candidate,
    bin_fill,
    candidates,
    device_budget_bytes,
    fused_possible,
    packing_refusal,
)
from laras.planning.memory import lora_parameters
from laras.planning.precision import choose_precision
from laras.planning.remedies import find_remedies
from laras.planning.simulated import Simulate, simulated_memory
from laras.planning.workload import Workload, workload
from laras.records import (
    Alternative,
    DatasetProfile,
    HardwareSpec,
    ModelSpec,
    PlanChoices,
    Precision,
    SplitManifest,
    TimeEstimate,
    TrainPlan,
    digest_of,
)

# A row costs half as much to validate as to train on, with frozen weights; so much of a run may go to validation.
_FORWARD_SHARE, _EVALUATION_SHARE = 0.5, 0.2
_RSLORA_FROM = 3e9
# The closed form is trusted to this share: candidates above it are not simulated, and without a simulation a plan
# must leave this much.
_CLOSED_FORM_MARGIN = 0.10
_MOST_SIMULATIONS = 6
_GIB = 2**30


def plan_training(
    config: RunConfig,
    profile: DatasetProfile | None,
    manifest: SplitManifest | None,
    spec: ModelSpec,
    hardware: HardwareSpec,
    simulate: Simulate | None = None,
) -> TrainPlan:
    """Resolves every `auto` of the configuration for this model, data and device.

    Args:
        config: What the user wants; given values are respected.
        profile: What the data is; None assumes that every example has `max_length` tokens.
        manifest: How the rows were divided; None assumes one optimizer step an epoch.
        spec: The architecture.
        hardware: The device.
        simulate: `laras.models.simulation.trace_step`; None plans by the closed form alone.

    Returns:
        The plan; `fits` is False, with `remedies`, when nothing that the configuration allows fits.

    Raises:
        ConfigError: The requested precision does not train on this device.
    """
    if config.backend == "unsloth":
        raise ConfigError(
            "backend unsloth is not there yet; this version trains through transformers and its own fused layers",
            hint="set `backend: auto`",
        )
    precision, why = choose_precision(config.precision, hardware.kind, hardware.compute_capability)
    work = workload(config, profile, manifest, spec)
    found = candidates(config, spec, hardware, precision, work)
    warnings = _family_warnings(config, spec)
    best = _choose(config, spec, hardware, work, found, simulate, warnings)
    steps = _steps(config, work, best)
    choices = _choices(config, spec, best, _eval_steps(config, work, steps))
    reasons = {"precision": f"{precision}: {why}", **_reasons(config, spec, hardware, precision, work, found, best)}
    others = [one for one in found if one.case != best.case or one.packing != best.packing]
    others.sort(key=lambda one: (not one.fits, *one.preference()))
    remedies: tuple[str, ...] = ()
    if not best.fits:
        remedies = find_remedies(config, profile, manifest, spec, hardware)
        warnings.append(
            f"needs {_gib(best.memory.train_peak_reserved_bytes)}, and {_gib(best.memory.device_budget_bytes)} may be "
            f"used on {hardware.gpu_name}"
        )
    return TrainPlan(
        parent_digest=manifest.digest() if manifest else None,
        config_digest=digest_of(config.model_dump(mode="json")),
        model=spec,
        hardware=hardware,
        choices=choices,
        reasons=reasons,
        memory=best.memory,
        time=_time(work, steps, choices.eval_steps, best.tokens_per_s),
        total_steps=steps,
        fits=best.fits,
        alternatives=tuple(_alternative(one) for one in others[:5]),
        remedies=remedies,
        warnings=tuple(warnings),
    )


def _family_warnings(config: RunConfig, spec: ModelSpec) -> list[str]:
    """What a plan for an architecture that nobody has looked at does not know."""
    warnings = []
    if spec.model_type not in FAMILIES:
        warnings.append(f"parameters of {spec.model_type} are counted as those of a plain Llama decoder")
    if config.packing is True and spec.model_type not in PACKABLE_TYPES:
        warnings.append(
            f"packing as configured, but {spec.model_type} is not known to keep packed documents apart: they may see "
            "each other"
        )
    return warnings


def _time(work: Workload, steps: int, eval_steps: int, tokens_per_s: float) -> TimeEstimate:
    validations = ceil(steps / eval_steps)  # one at every interval, and one at the end
    tokens = steps * work.step_tokens + validations * _FORWARD_SHARE * work.validation_tokens
    return TimeEstimate(tokens_per_s=tokens_per_s, steps=steps, total_s=tokens / tokens_per_s)


def _choose(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    work: Workload,
    found: list[Candidate],
    simulate: Simulate | None,
    warnings: list[str],
) -> Candidate:
    """The best candidate that fits, or the smallest one."""
    smallest = min(found, key=lambda one: one.memory.train_peak_reserved_bytes)
    if hardware.kind == "cpu":
        simulate = None  # main memory has no segments to replay, and is overcommitted anyway
    limit = device_budget_bytes(config, hardware)
    tried = 0
    last: Candidate | None = None
    for one in found if simulate is not None else ():
        if one.memory.train_peak_allocated_bytes > limit * (1 + _CLOSED_FORM_MARGIN) and one is not smallest:
            continue
        try:
            assert simulate is not None
            exact = _simulated(config, spec, hardware, work, one, limit, simulate)
        except LarasError as error:
            warnings.append(f"{error.message}; memory is from the closed form, with a margin of 10%")
            return _by_closed_form(found, smallest, 1 - _CLOSED_FORM_MARGIN)
        if exact.fits:
            return exact
        tried, last = tried + 1, exact
        limit_reached = tried >= _MOST_SIMULATIONS
        if limit_reached:
            break
    if simulate is not None:
        if last is not None and last.case == smallest.case:
            return last
        return _simulated(config, spec, hardware, work, smallest, limit, simulate)
    return _by_closed_form(found, smallest, 1.0)


def _by_closed_form(found: list[Candidate], smallest: Candidate, share: float) -> Candidate:
    for one in found:
        needed = max(one.memory.train_peak_reserved_bytes, one.memory.eval_peak_allocated_bytes)
        if needed <= share * one.memory.device_budget_bytes:
            return one
    return smallest if smallest.fits and share == 1.0 else replace(smallest, fits=False)


def _simulated(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    work: Workload,
    one: Candidate,
    budget: int,
    simulate: Simulate,
) -> Candidate:
    documents = work.documents(one.case.micro_batch * one.case.length_tokens) if one.packing else None
    memory, fits = simulated_memory(simulate, config, _choices(config, spec, one, 1), spec, hardware, budget, documents)
    return replace(one, memory=memory, fits=fits)


def _steps(config: RunConfig, work: Workload, best: Candidate) -> int:
    if config.max_steps:
        return config.max_steps
    if not work.rows:
        return max(1, ceil(config.num_train_epochs))
    if best.packing:
        bins = ceil(work.rows * work.mean_tokens / (bin_fill(work) * best.case.micro_batch * work.length_tokens))
        return max(1, ceil(ceil(bins / best.accumulation) * config.num_train_epochs))
    return max(1, ceil(ceil(work.rows / config.effective_batch_size) * config.num_train_epochs))


def _eval_steps(config: RunConfig, work: Workload, steps: int) -> int:
    """Steps between evaluations: a tenth of the run, at most 100, but far enough apart to cost little of it."""
    if config.eval_steps != "auto":
        return config.eval_steps
    usual = max(1, min(100, steps // 10))
    affordable = ceil(_FORWARD_SHARE * work.validation_tokens / (_EVALUATION_SHARE * work.step_tokens))
    return max(1, min(max(usual, affordable), steps // 2))


def _choices(config: RunConfig, spec: ModelSpec, best: Candidate, eval_steps: int) -> PlanChoices:
    case, full = best.case, best.case.full
    rslora = spec.total_parameters > _RSLORA_FROM if config.use_rslora == "auto" else config.use_rslora
    trained = spec.total_parameters if full else lora_parameters(spec, case.lora_r, case.target_modules)
    if config.use_dora and not full:
        trained += _dora_parameters(spec, case.target_modules)
    rate = (2e-5 if full else 2e-4) if config.learning_rate == "auto" else config.learning_rate
    attention = config.attn_implementation
    if attention == "auto":
        attention = "varlen" if best.packing else "sdpa"
    return PlanChoices(
        per_device_train_batch_size=case.micro_batch,
        per_device_eval_batch_size=case.eval_batch,
        gradient_accumulation_steps=best.accumulation,
        gradient_checkpointing=case.checkpointing,
        checkpoint_kind=case.checkpoint_kind,
        fused_layers=case.fused,
        mlp_chunk_tokens=case.mlp_chunk_tokens,
        loss_chunk_tokens=LOSS_CHUNK_TOKENS,
        packing=best.packing,
        max_length=case.length_tokens,
        finetuning_type=config.finetuning_type,
        load_in_4bit=case.weights == "nf4",
        load_in_8bit=config.load_in_8bit,
        precision=case.precision,
        optim=case.optim,
        backend="transformers" if config.backend == "auto" else config.backend,
        attention=attention,
        loss_kind=case.loss_kind,
        lora_r=case.lora_r,
        lora_alpha=2.0 * case.lora_r if config.lora_alpha == "auto" else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=rslora,
        use_dora=config.use_dora,
        target_modules=case.target_modules,
        trainable_parameters=trained,
        total_parameters=spec.total_parameters + (0 if full else trained),
        learning_rate=rate,
        eval_steps=eval_steps,
        save_steps=eval_steps if config.save_steps == "auto" else config.save_steps,
        logging_steps=config.logging_steps,
    )


def _dora_parameters(spec: ModelSpec, targets: tuple[str, ...]) -> int:
    """One magnitude for every output."""
    from laras.planning.memory import adapted_layers

    return spec.layers * sum(outputs for _, _, outputs in adapted_layers(spec, targets))


def _reasons(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    precision: Precision,
    work: Workload,
    found: list[Candidate],
    best: Candidate,
) -> dict[str, str]:
    case, given = best.case, "as configured"
    cap = min(config.max_length, spec.max_position_embeddings)
    verdict = "the fastest that fits" if best.fits else "the smallest that the configuration allows"
    size = f"{spec.total_parameters / 1e9:.2f}B parameters"
    padding = 1 - work.mean_tokens / max(1, work.expected_longest(case.micro_batch))
    refusal = packing_refusal(config, spec, hardware, precision, work)
    packing = f"off: {refusal}" if refusal else f"on: padding would be {padding:.0%} of the tokens"
    uncheckpointed = [one for one in found if not one.case.checkpointing and one.quantised == best.quantised]
    checkpointing = "off: everything fits, and recomputing costs time"
    if case.checkpointing:
        least = min((one.memory.train_peak_reserved_bytes for one in uncheckpointed), default=0)
        fits_without = any(one.fits for one in uncheckpointed)
        checkpointing = f"on ({case.checkpoint_kind}): without it at least {_gib(least)} are needed"
        if fits_without:
            checkpointing = f"on ({case.checkpoint_kind}): larger micro-batches gain more than recomputing costs"
    wide = [one for one in found if not one.quantised]
    four_bit = f"16-bit weights fit {hardware.gpu_name}" if precision != "fp32" else "unquantised weights fit"
    if case.weights == "nf4" and wide:
        least = min(one.memory.train_peak_reserved_bytes for one in wide)
        four_bit = f"unquantised weights need at least {_gib(least)}"
    fused = fused_possible(config, spec, hardware, precision, work.length_tokens)
    return {
        "max_length": f"the longest example in multiples of 128, at most {cap}"
        if work.stats
        else f"no data: every example is taken to have {work.length_tokens} tokens",
        "per_device_train_batch_size": verdict if config.per_device_train_batch_size == "auto" else given,
        "gradient_accumulation_steps": f"keeps {config.effective_batch_size} examples an optimizer step"
        + (" on average" if best.packing else ""),
        "gradient_checkpointing": checkpointing if config.gradient_checkpointing == "auto" else given,
        "packing": packing if config.packing == "auto" else given,
        "load_in_4bit": four_bit if config.load_in_4bit == "auto" else given,
        "optim": _optim_reason(config, hardware, best),
        "loss_kind": f"{case.loss_kind}: "
        + ("logits exist for a part of the tokens at a time" if case.loss_kind == "chunked" else "this head or method")
        if config.loss_kind == "auto"
        else given,
        "attention": ("documents of a bin are kept apart" if best.packing else "padded rows")
        if config.attn_implementation == "auto"
        else given,
        "backend": f"{'fused' if fused else 'transformers'} layers" if config.backend == "auto" else given,
        "lora_r": f"for {size}" if config.lora_r == "auto" else given,
        "lora_alpha": "twice the rank" if config.lora_alpha == "auto" else given,
        "use_rslora": f"from 3B on; {size}" if config.use_rslora == "auto" else given,
        "target_modules": "every linear layer but the head" if config.lora_target_modules == "auto" else given,
        "learning_rate": ("full fine-tuning" if case.full else "LoRA") if config.learning_rate == "auto" else given,
        "eval_steps": "a tenth of the run, at most 100 steps, unless validating would then cost a fifth of it"
        if config.eval_steps == "auto"
        else given,
    }


def _optim_reason(config: RunConfig, hardware: HardwareSpec, best: Candidate) -> str:
    if config.optim != "auto":
        return "as configured"
    if best.case.optim == "paged_adamw_8bit":
        return "exact optimizer states do not fit; 8-bit ones are paged to main memory"
    return "exact states fit; one kernel updates them" if hardware.kind == "cuda" else "the CPU's"


def _alternative(candidate: Candidate) -> Alternative:
    case = candidate.case
    return Alternative(
        per_device_train_batch_size=case.micro_batch,
        gradient_checkpointing=case.checkpointing,
        packing=candidate.packing,
        load_in_4bit=case.weights == "nf4",
        loss_kind=case.loss_kind,
        train_peak_allocated_bytes=candidate.memory.train_peak_allocated_bytes,
        tokens_per_s=candidate.tokens_per_s,
        fits=candidate.fits,
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"
