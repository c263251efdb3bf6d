"""What would make an impossible run possible; each is evaluated before it is proposed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from laras.config import RunConfig
from laras.errors import LarasError
from laras.formatting import size
from laras.planning.candidates import HOST_SHARE, candidates, has_bitsandbytes, host_budget_bytes
from laras.planning.catalogue import CATALOGUE
from laras.planning.precision import choose_precision
from laras.planning.workload import workload
from laras.records import DatasetProfile, HardwareSpec, MemoryEstimate, ModelSpec, SplitManifest

_SHORTEST_TOKENS = 128
# Cards that many people can rent or own, by rising memory; others of the catalogue are as good.
_COMMON = ("T4", "L4", "RTX 5090", "A100 40GB", "L40S", "H100", "H200", "B200")
# A proposal keeps this share of the budget free, since it rests on the closed form.
_MARGIN = 0.05


def find_remedies(
    config: RunConfig,
    profile: DatasetProfile | None,
    manifest: SplitManifest | None,
    spec: ModelSpec,
    hardware: HardwareSpec,
) -> tuple[str, ...]:
    """Single changes after which something fits, in the order of what they cost; then a card that is large enough."""
    found: list[str] = []

    def fitting(changed: RunConfig, device: HardwareSpec) -> list[MemoryEstimate]:
        try:
            precision, _ = choose_precision(changed.precision, device.kind, device.compute_capability)
        except LarasError:
            return []
        work = workload(changed, profile, manifest, spec)
        memory = [one.memory for one in candidates(changed, spec, device, precision, work)]
        return [
            one
            for one in memory
            if max(one.train_peak_reserved_bytes, one.eval_peak_allocated_bytes)
            <= (1 - _MARGIN) * one.device_budget_bytes
        ]

    def fits(changed: RunConfig, device: HardwareSpec) -> bool:
        return bool(fitting(changed, device))

    roomy = fitting(config, hardware.model_copy(update={"host_available_bytes": None}))
    needs = [one.host_bytes for one in roomy if one.host_bytes > host_budget_bytes(hardware)]
    if needs:
        free = size(hardware.host_available_bytes or 0)
        found.append(f"{size(min(needs) / HOST_SHARE)} of free main memory instead of {free} fits")
    for text, changes in _changes(config, hardware):
        if fits(config.model_copy(update=changes), hardware):
            found.append(f"{text} fits")
    length = min(config.max_length, spec.max_position_embeddings) // 2
    while length >= _SHORTEST_TOKENS:
        if fits(config.model_copy(update={"max_length": length}), hardware):
            found.append(f"max_length: {length} fits")
            break
        length //= 2
    if hardware.kind == "cuda":
        for name in _COMMON:
            card = next(gpu for gpu in CATALOGUE if gpu.name == name)
            if card.total_bytes > hardware.total_bytes and fits(config, card.to_hardware()):
                found.append(f"{card.name} ({card.memory_gib:.0f} GB) fits")
                break
    return tuple(found) or ("no single change fits; a smaller model does",)


def _changes(config: RunConfig, hardware: HardwareSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    cuda = hardware.kind == "cuda"
    if config.gradient_checkpointing is False:
        yield "gradient_checkpointing: auto", {"gradient_checkpointing": "auto"}
    if config.per_device_train_batch_size not in ("auto", 1):
        yield "per_device_train_batch_size: auto", {"per_device_train_batch_size": "auto"}
    if config.cuda_graph is True:
        yield "cuda_graph: auto", {"cuda_graph": "auto"}
    if config.loss_kind == "full":
        yield "loss_kind: auto", {"loss_kind": "auto"}
    four_bit_open = config.load_in_4bit == "auto" and has_bitsandbytes()  # then it was tried already
    if cuda and config.finetuning_type == "lora" and config.load_in_4bit is not True and not four_bit_open:
        yield "load_in_4bit: true", {"load_in_4bit": True}
    if config.finetuning_type == "full":
        yield "finetuning_type: lora", {"finetuning_type": "lora", "optim": "auto"}
    if cuda and config.finetuning_type == "full" and config.optim not in ("auto", "paged_adamw_8bit"):
        yield "optim: paged_adamw_8bit", {"optim": "paged_adamw_8bit"}
    if config.memory_budget_fraction != "auto" and config.memory_budget_fraction < 0.95:
        yield "memory_budget_fraction: auto", {"memory_budget_fraction": "auto"}
