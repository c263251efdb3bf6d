"""The fastest settings that fit the device, and why; the optimisation itself stays as the user set it.

The closed form ranks every combination at once (`candidates`); the steps of the best are then simulated, and whether
one fits is decided by a replay of the allocator at the device's capacity (`selection`).
"""

from __future__ import annotations

from math import ceil

from laras.config import RunConfig
from laras.formatting import short, size
from laras.planning.architecture import FAMILIES
from laras.planning.backend import capability_of, choose_backend, layers_of
from laras.planning.candidates import (
    EFFECTIVE_SLACKS,
    PACKABLE_TYPES,
    Candidate,
    candidates,
    fused_possible,
    host_budget_bytes,
    packing_refusal,
)
from laras.planning.cuda_graph import replay_reason
from laras.planning.fused_memory import offloaded_bytes
from laras.planning.precision import choose_precision
from laras.planning.remedies import find_remedies
from laras.planning.selection import Selection, resolved_choices, select
from laras.planning.simulated import Simulate
from laras.planning.workload import Workload, workload
from laras.record_base import digest_of
from laras.records import (
    Alternative,
    DatasetProfile,
    HardwareSpec,
    ModelSpec,
    Precision,
    SplitManifest,
    TimeEstimate,
    TrainPlan,
)

# A row costs half as much to validate as to train on, with frozen weights; so much of a run may go to validation.
_FORWARD_SHARE, _EVALUATION_SHARE = 0.5, 0.2
_SEEN = 1.01  # of two speeds, a difference that anyone would ask about


def plan_training(
    config: RunConfig,
    profile: DatasetProfile | None,
    manifest: SplitManifest | None,
    spec: ModelSpec,
    hardware: HardwareSpec,
    simulate: Simulate | None = None,
    import_failure: str | None = None,
) -> TrainPlan:
    """Resolves every `auto` of the configuration for this model, data and device.

    Args:
        config: What the user wants; given values are respected.
        profile: What the data is; None assumes that every example has `max_length` tokens.
        manifest: How the rows were divided; None assumes one optimizer step an epoch.
        spec: The architecture.
        hardware: The device.
        simulate: `laras.models.simulation.trace_step`; None plans by the closed form alone.
        import_failure: Why Unsloth could not be imported, once that was tried.

    Returns:
        The plan; `fits` is False, with `remedies`, when nothing that the configuration allows fits.

    Raises:
        ConfigError: The requested precision does not train on this device.
    """
    config_digest = digest_of(config.model_dump(mode="json"))
    precision, why = choose_precision(config.precision, hardware.kind, hardware.compute_capability)
    work = workload(config, profile, manifest, spec)
    own = config.model_copy(update={"backend": "transformers"})
    layers = layers_of(fused_possible(own, spec, hardware, precision, work.length_tokens))
    backend = choose_backend(config, spec, capability_of(hardware), layers, import_failure)
    config = config.model_copy(update={"backend": backend.name})
    found = candidates(config, spec, hardware, precision, work)
    warnings = _family_warnings(config, spec)
    if backend.refusal:
        warnings.append(f"trained without Unsloth: {backend.refusal}")
    selection = select(config, spec, hardware, work, found, simulate)
    best, others = selection.best, selection.others
    warnings += selection.warnings
    if config.cuda_graph is True and not best.replayed:
        warnings.append(f"not replayed as a CUDA graph: {replay_reason(config, hardware, best).removeprefix('off: ')}")
    examples = best.accumulation * _examples(work, best)
    if not _keeps_batch(config, examples):
        warnings.append(
            f"an optimizer step has {examples:.0f} examples, not the {config.effective_batch_size} of "
            "effective_batch_size: the packing or the sizes that are given allow none that is nearer"
        )
    steps = _steps(config, work, best)
    choices = resolved_choices(config, spec, best, steps, _eval_steps(config, work, steps))
    reasons = _reasons(config, spec, hardware, precision, work, found, selection)
    reasons |= {"precision": f"{precision}: {why}", "backend": backend.reason}
    remedies: tuple[str, ...] = ()
    if not best.fits:
        remedies = find_remedies(config, profile, manifest, spec, hardware)
        warnings.append(
            f"needs {size(best.memory.train_peak_reserved_bytes)}, and {size(best.memory.device_budget_bytes)} may be "
            f"used on {hardware.gpu_name}"
        )
    return TrainPlan(
        parent_digest=manifest.digest() if manifest else None,
        config_digest=config_digest,
        model=spec,
        hardware=hardware,
        choices=choices,
        reasons=reasons,
        memory=best.memory,
        time=_time(work, steps, choices.eval_steps, best.tokens_per_s, examples * work.mean_tokens),
        total_steps=steps,
        fits=best.fits,
        alternatives=tuple(_alternative(one) for one in others[:5]),
        remedies=remedies,
        warnings=tuple(warnings),
    )


def _family_warnings(config: RunConfig, spec: ModelSpec) -> list[str]:
    """What a plan for an architecture that nobody has looked at does not know."""
    warnings = []
    if spec.model_type not in FAMILIES and not spec.is_counted:
        warnings.append(f"parameters of {spec.model_type} are counted as those of a plain Llama decoder")
    if config.packing is True and spec.model_type not in PACKABLE_TYPES:
        warnings.append(
            f"packing as configured, but {spec.model_type} is not known to keep packed documents apart: they may see "
            "each other"
        )
    return warnings


def _time(work: Workload, steps: int, eval_steps: int, tokens_per_s: float, step_tokens: float) -> TimeEstimate:
    validations = ceil(steps / eval_steps)  # one at every interval, and one at the end
    tokens = steps * step_tokens + validations * _FORWARD_SHARE * work.validation_tokens
    return TimeEstimate(tokens_per_s=tokens_per_s, steps=steps, total_s=tokens / tokens_per_s)


def _steps(config: RunConfig, work: Workload, best: Candidate) -> int:
    if config.max_steps:
        return config.max_steps
    if not work.rows:
        return max(1, ceil(config.num_train_epochs))
    micro_batches = ceil(work.rows / _examples(work, best))
    return max(1, ceil(ceil(micro_batches / best.accumulation) * config.num_train_epochs))


def _examples(work: Workload, best: Candidate) -> float:
    """Of a micro-batch; of a bin on average."""
    rows, bin_tokens = best.case.micro_batch, best.case.bin_tokens
    return rows if bin_tokens is None else work.useful_tokens(rows, bin_tokens) / work.mean_tokens


def _keeps_batch(config: RunConfig, examples: float) -> bool:
    return abs(examples / config.effective_batch_size - 1) <= EFFECTIVE_SLACKS[-1]


def _eval_steps(config: RunConfig, work: Workload, steps: int) -> int:
    """Steps between evaluations: a tenth of the run, at most 100, but far enough apart to cost little of it."""
    if config.eval_steps != "auto":
        return config.eval_steps
    usual = max(1, min(100, steps // 10))
    affordable = ceil(_FORWARD_SHARE * work.validation_tokens / (_EVALUATION_SHARE * work.step_tokens))
    wanted = max(1, min(max(usual, affordable), steps // 2))
    return ceil(steps / max(1, round(steps / wanted)))  # at equal distances, so that the last is not soon after another


def _reasons(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    precision: Precision,
    work: Workload,
    found: list[Candidate],
    selection: Selection,
) -> dict[str, str]:
    best = selection.best
    case, given = best.case, "as configured"
    cap = min(config.max_length, spec.max_position_embeddings)
    verdict = _verdict(best, selection.others)
    parameters = f"{short(spec.total_parameters)} parameters"
    rows = case.micro_batch if case.bin_tokens is None else max(1, round(case.bin_tokens / work.mean_tokens))
    micro = verdict if case.bin_tokens in (None, case.micro_batch * case.length_tokens) else "a row is a bin"
    padding = 1 - work.mean_tokens / max(1, work.expected_longest(rows))
    refusal = packing_refusal(config, spec, hardware, precision, work)
    packing = f"off: {refusal}" if refusal else f"on: padding would be {padding:.0%} of the tokens"
    wide = [one for one in found if not one.quantised]
    four_bit = f"16-bit weights fit {hardware.gpu_name}" if precision != "fp32" else "unquantised weights fit"
    if case.weights == "nf4" and wide:
        least = min(one.memory.train_peak_reserved_bytes for one in wide)
        four_bit = f"unquantised weights need at least {size(least)}"
        if least <= best.memory.device_budget_bytes:
            four_bit += ", and the allocator more than there is"
    return {
        "max_length": f"the longest example in multiples of 128, at most {cap}"
        if work.stats
        else f"no data: every example is taken to have {work.length_tokens} tokens",
        "per_device_train_batch_size": micro if config.per_device_train_batch_size == "auto" else given,
        "bin_tokens": _bin_reason(work, best, verdict),
        "gradient_accumulation_steps": _batch_reason(config, work, best),
        "gradient_checkpointing": _checkpointing_reason(config, spec, hardware, found, best),
        "packing": packing if config.packing == "auto" else given,
        "cuda_graph": replay_reason(config, hardware, best),
        "load_in_4bit": four_bit if config.load_in_4bit == "auto" else given,
        "optim": _optim_reason(config, hardware, best),
        "loss_kind": f"{case.loss_kind}: "
        + ("logits exist for a part of the tokens at a time" if case.loss_kind == "chunked" else "this head or method")
        if config.loss_kind == "auto"
        else given,
        "attention": _attention_reason(config, best),
        "lora_r": f"for {parameters}" if config.lora_r == "auto" else given,
        "lora_alpha": "twice the rank" if config.lora_alpha == "auto" else given,
        "use_rslora": f"from 3B on; {parameters}" if config.use_rslora == "auto" else given,
        "target_modules": "every linear layer but the head" if config.lora_target_modules == "auto" else given,
        "learning_rate": f"the default of {'full fine-tuning' if case.full else 'LoRA'}"
        if config.learning_rate == "auto"
        else given,
        "eval_steps": "a tenth of the run, at most 100 steps, unless validating would then cost a fifth of it"
        if config.eval_steps == "auto"
        else given,
    }


def _bin_reason(work: Workload, best: Candidate, verdict: str) -> str:
    tokens = best.case.bin_tokens
    if tokens is None:
        return "rows are padded"
    return f"a bin holds {_examples(work, best):.1f} examples on average; {verdict}"


def _batch_reason(config: RunConfig, work: Workload, best: Candidate) -> str:
    examples = best.accumulation * _examples(work, best)
    if best.packing and _keeps_batch(config, examples):
        return f"keeps {config.effective_batch_size} examples an optimizer step on average"
    return f"{'keeps ' if examples == config.effective_batch_size else ''}{examples:.0f} examples an optimizer step"


def _verdict(best: Candidate, others: tuple[Candidate, ...]) -> str:
    """What the sizes are, of all that there could be."""
    if not best.fits:
        return "the smallest that the configuration allows"
    if best.memory.host_bytes:
        return "about the fastest that fits; a larger one takes more main memory"
    alike = (one for one in others if one.fits and one.is_as_exact_as(best))
    if any(one.tokens_per_s > _SEEN * best.tokens_per_s for one in alike):
        return "the fastest that fits, where the host has other work too"
    return "the fastest that fits"


def _checkpointing_reason(
    config: RunConfig, spec: ModelSpec, hardware: HardwareSpec, found: list[Candidate], best: Candidate
) -> str:
    """Why activations are computed again, and where what is kept of them is."""
    case, kind = best.case, best.case.checkpoint_kind
    alike = [one for one in found if one.quantised == best.quantised]
    is_open = config.gradient_checkpointing == "auto"
    if not case.checkpointing:
        return "off: everything fits, and recomputing costs time" if is_open else "as configured"
    said = ["as configured"]
    if is_open:
        said = [_why_not([one for one in alike if not one.case.checkpointing], best, "without it", "recomputing")]
    if kind == "offload":
        whole = [one for one in alike if one.case.checkpoint_kind == "full"]
        said.append(_why_not(whole, best, "with inputs of layers on the card", "copying them"))
        said.append(f"{size(best.memory.host_bytes)} of main memory hold the inputs")
    elif kind == "full" and case.fused and hardware.kind == "cuda":
        element = 4 if case.precision == "fp32" else 2
        needed = offloaded_bytes(spec, case.tokens, element)
        room = host_budget_bytes(hardware)
        if needed > room:
            said.append(f"their inputs would need {size(needed)} of main memory, of which {size(room)} may be taken")
    return f"on ({kind}): {'; '.join(said)}"


def _why_not(others: list[Candidate], best: Candidate, words: str, cost: str) -> str:
    fitting = [one for one in others if one.fits]  # by the closed form
    if any(one.case.tokens >= best.case.tokens for one in fitting):
        return f"{words} the allocator needs more than there is"
    if fitting:
        return f"larger micro-batches gain more than {cost} costs"
    least = min((one.memory.train_peak_reserved_bytes for one in others), default=0)
    return f"{words} at least {size(least)} are needed"


def _optim_reason(config: RunConfig, hardware: HardwareSpec, best: Candidate) -> str:
    if config.optim != "auto":
        return "as configured"
    if best.case.optim == "paged_adamw_8bit":
        return "exact optimizer states do not fit; 8-bit ones are paged to main memory"
    return "exact states fit; one kernel updates them" if hardware.kind == "cuda" else "the CPU's"


def _attention_reason(config: RunConfig, best: Candidate) -> str:
    if config.backend == "unsloth":
        return "Unsloth chooses the kernel when it runs"
    if config.attn_implementation != "auto":
        return "as configured"
    return "documents of a bin are kept apart" if best.packing else "padded rows"


def _alternative(candidate: Candidate) -> Alternative:
    case = candidate.case
    return Alternative(
        per_device_train_batch_size=case.micro_batch,
        bin_tokens=case.bin_tokens,
        gradient_checkpointing=case.checkpointing,
        packing=candidate.packing,
        load_in_4bit=case.weights == "nf4",
        loss_kind=case.loss_kind,
        train_peak_allocated_bytes=candidate.memory.train_peak_allocated_bytes,
        tokens_per_s=candidate.tokens_per_s,
        fits=candidate.fits,
        checkpoint_kind=case.checkpoint_kind,
    )
