"""Which candidate runs: the closed form ranks, simulated steps decide what fits and which of the best is fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from laras.config import RunConfig
from laras.errors import LarasError
from laras.planning.candidates import LOSS_CHUNK_TOKENS, Candidate, device_budget_bytes
from laras.planning.cuda_graph import share_of_speed, with_replay
from laras.planning.memory import adapted_layers, lora_parameters
from laras.planning.simulated import Simulate, simulated_step
from laras.planning.throughput import on_busy_host, recorded_step_s
from laras.planning.workload import Workload
from laras.records import HardwareSpec, ModelSpec, PlanChoices

_RSLORA_FROM = 3e9
# The closed form is trusted to this share: candidates above it are not simulated, and without a simulation a plan
# must leave this much.
_CLOSED_FORM_MARGIN = 0.10
_HOPELESS = 2.0  # times the budget, in closed form: nothing is simulated, since a step of any length could be asked for
_MOST_SIMULATIONS = 6
# Candidates that fit are compared by their simulated steps while the closed form sees them this close to the first.
_MOST_CONTENDERS, _CONTENDER_SHARE = 2, 0.93


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        best: The candidate that runs.
        others: The rest, with speeds on the scale of the best one's, less its graph where they can have none.
        warnings: What the choice could not rest on.
    """

    best: Candidate
    others: tuple[Candidate, ...]
    warnings: tuple[str, ...] = ()


def select(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    work: Workload,
    found: list[Candidate],
    simulate: Simulate | None,
) -> Selection:
    """The fastest candidate that fits, or the smallest one.

    Args:
        config: What the user wants.
        spec: The architecture.
        hardware: The device.
        work: What the data asks for.
        found: Every candidate, the best by closed form first.
        simulate: Records a step; None chooses by the closed form alone.
    """
    smallest = min(found, key=lambda one: one.memory.train_peak_reserved_bytes)
    limit = device_budget_bytes(config, hardware)
    if config.backend == "unsloth":
        # Not its layers, which keep less: 0.58 to 0.81 of plain ones in the cases that `planning.backend` has.
        best = _by_closed_form(found, smallest, 1 - _CLOSED_FORM_MARGIN)
        method = {"method": "closed-form of plain layers"}
        return _selection(config, hardware, found, replace(best, memory=best.memory.model_copy(update=method)))
    # Main memory has no segments to replay, and is overcommitted anyway.
    if simulate is None or hardware.kind == "cpu":
        return _selection(config, hardware, found, _by_closed_form(found, smallest, 1.0))
    if smallest.memory.train_peak_allocated_bytes > _HOPELESS * limit:
        return _selection(config, hardware, found, replace(smallest, fits=False))
    try:
        fitting, refused = _fitting(config, spec, hardware, work, found, simulate)
        if not fitting:
            known = [one for one in refused if one.case == smallest.case]
            last = known[0] if known else _simulated(config, spec, hardware, work, smallest, limit, simulate)
            return _selection(config, hardware, found, last, refused)
    except LarasError as error:
        warning = f"{error.message}; memory is from the closed form, with a margin of 10%"
        return _selection(
            config, hardware, found, _by_closed_form(found, smallest, 1 - _CLOSED_FORM_MARGIN), warnings=(warning,)
        )
    return _selection(config, hardware, found, max(fitting, key=lambda one: one.worth), [*fitting, *refused])


def _fitting(
    config: RunConfig,
    spec: ModelSpec,
    hardware: HardwareSpec,
    work: Workload,
    found: list[Candidate],
    simulate: Simulate,
) -> tuple[list[Candidate], list[Candidate]]:
    """Simulated candidates: those that fit, about as good as the first that does, and those that do not."""
    limit = device_budget_bytes(config, hardware)
    fitting: list[Candidate] = []
    refused: list[Candidate] = []
    too_large: set[str] = set()  # ways to store weights that leave no room for anything else
    first: Candidate | None = None
    for one in found:
        if one.memory.train_peak_allocated_bytes > limit * (1 + _CLOSED_FORM_MARGIN) or one.case.weights in too_large:
            continue
        if first is not None and not _contends(one, first):
            break
        exact = _simulated(config, spec, hardware, work, one, limit, simulate)
        if exact.fits:
            first = first or one
            fitting.append(exact)
        else:
            refused.append(exact)
            if exact.memory.components["weights"] > limit:
                too_large.add(one.case.weights)
        if len(fitting) >= _MOST_CONTENDERS or len(refused) >= _MOST_SIMULATIONS:
            break
    return fitting, refused


def _contends(one: Candidate, first: Candidate) -> bool:
    return one.is_as_exact_as(first) and one.worth >= _CONTENDER_SHARE * first.worth


def _selection(
    config: RunConfig,
    hardware: HardwareSpec,
    found: list[Candidate],
    best: Candidate,
    simulated: Sequence[Candidate] = (),
    warnings: tuple[str, ...] = (),
) -> Selection:
    """The rest as far as it is known: as simulated, else in closed form with speeds on the scale of the best one's."""
    by_closed_form = max((one.tokens_per_s for one in found if _key(one) == _key(best)), default=best.tokens_per_s)
    scale = best.tokens_per_s / by_closed_form
    known = {_key(one): one for one in simulated}
    others = [
        known.get(_key(one)) or one.at_speed(scale * share_of_speed(config, hardware, best, one))
        for one in found
        if one.case != best.case
    ]
    others.sort(key=lambda one: (not one.fits, *one.preference()))
    return Selection(best, tuple(others), warnings)


def _key(one: Candidate) -> tuple[object, ...]:
    return one.case, one.accumulation


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
    case = one.case
    documents = work.documents(case.bin_tokens) if case.bin_tokens else None
    choices = resolved_choices(config, spec, one, 1, 1)
    largest = work.largest_batch(case.micro_batch, case.bin_tokens)
    step = simulated_step(simulate, config, choices, spec, hardware, budget, documents, largest)
    expected = case.bin_tokens or work.expected_longest(case.micro_batch)
    recorded = case.bin_tokens or case.micro_batch * largest.row_tokens
    useful = work.useful_tokens(case.micro_batch, case.bin_tokens)

    def rate(hardware: HardwareSpec, *, replayed: bool) -> float:
        return useful / recorded_step_s(
            step.work,
            hardware,
            span_tokens=work.attended_tokens if one.packing else expected,
            target_share=work.target_share * recorded / (largest.target_tokens or recorded),
            token_share=expected / largest.row_tokens,
            accumulation=one.accumulation,
            replayed=replayed,
        )

    memory = step.memory.model_copy(update={"host_bytes": one.memory.host_bytes})
    issued, replayed = (
        replace(
            one,
            memory=memory,
            fits=step.fits,
            tokens_per_s=rate(hardware, replayed=replayed),
            busy_tokens_per_s=rate(on_busy_host(hardware), replayed=replayed),
        )
        for replayed in (False, True)
    )
    return with_replay(config, hardware, issued, replayed, choices.trainable_parameters)


def resolved_choices(
    config: RunConfig, spec: ModelSpec, best: Candidate, total_steps: int, eval_steps: int
) -> PlanChoices:
    """Everything that training needs to know, of a candidate."""
    case, full = best.case, best.case.full
    rslora = spec.total_parameters > _RSLORA_FROM if config.use_rslora == "auto" else config.use_rslora
    trained = spec.total_parameters if full else lora_parameters(spec, case.lora_r, case.target_modules)
    if config.use_dora and not full:
        trained += _dora_parameters(spec, case.target_modules)
    rate = (2e-5 if full else 2e-4) if config.learning_rate == "auto" else config.learning_rate
    attention = config.attn_implementation
    if attention == "auto":
        attention = "varlen" if best.packing else "sdpa"
    if config.backend == "unsloth":
        attention = "unsloth"
    return PlanChoices(
        per_device_train_batch_size=case.micro_batch,
        bin_tokens=case.bin_tokens,
        per_device_eval_batch_size=case.eval_batch,
        gradient_accumulation_steps=best.accumulation,
        gradient_checkpointing=case.checkpointing,
        checkpoint_kind=case.checkpoint_kind,
        cuda_graph=best.replayed,
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
        # A curve of a short run has points, too.
        logging_steps=min(10, max(1, total_steps // 50)) if config.logging_steps == "auto" else config.logging_steps,
    )


def _dora_parameters(spec: ModelSpec, targets: tuple[str, ...]) -> int:
    """One magnitude for every output."""
    return spec.layers * sum(outputs for _, _, outputs in adapted_layers(spec, targets))
