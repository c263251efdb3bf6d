"""Which library builds the layers, from the configuration alone: Unsloth has to be imported before any other.

`auto` decides by figures that were measured; a backend that was asked for and cannot run gives way to Laras' own layers
and says why. Nothing heavy is imported, so that this can be asked first.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

from laras.config import RunConfig
from laras.records import HardwareSpec, ModelSpec

Layers = Literal["fused", "transformers"]
UNSLOTH_VERSION = "2026.10.9"
# Families for which Unsloth has layers of its own and whose logits are one plain product, as Laras' loss needs.
# Source: Unsloth 2026.10.9, `models/loader.py`, less Gemma 2, whose logits are capped.
UNSLOTH_TYPES = frozenset({"gemma", "llama", "mistral", "qwen2", "qwen3"})
_OLDEST_CAPABILITY = (7, 0)
_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Comparison:
    """One case that was measured with both, in one run on one card, at equal tokens a step.

    Attributes:
        layers: Laras' side.
        case: As `benchmarks/results/throughput.md` names it.
        quantised: With 4-bit weights.
        checkpointing: Layers recompute their activations.
        own_tokens_per_s: Useful tokens a second of Laras.
        unsloth_tokens_per_s: The same of Unsloth.
    """

    layers: Layers
    case: str
    quantised: bool
    checkpointing: bool
    own_tokens_per_s: float
    unsloth_tokens_per_s: float


# Source: `benchmarks/results/throughput.jsonl`; H100 80GB HBM3, torch 2.11, transformers 5.17, Unsloth 2026.10.9 with
# xformers, packed. Transformers' own layers were not measured beside Unsloth in one run, so no line is about them.
MEASURED = (
    Comparison("fused", "lora_16k", False, False, 64_101.7, 47_972.6),
    Comparison("fused", "lora_full_16k", False, True, 48_808.1, 31_772.7),
    Comparison("fused", "qlora_full_16k", True, True, 47_157.3, 30_355.7),
    Comparison("fused", "lora_8k", False, False, 61_600.8, 31_108.6),
    Comparison("fused", "lora_full_8k", False, True, 41_654.1, 19_734.7),
    Comparison("fused", "qlora_full_8k", True, True, 29_475.1, 10_826.8),
    Comparison("fused", "7b_qlora_full_8k", True, True, 12_542.0, 9_503.0),
)


@dataclass(frozen=True)
class BackendChoice:
    """What builds the layers.

    Attributes:
        name: The backend that runs.
        reason: One line, for the plan.
        refusal: Why Unsloth, which was asked for, does not run; None when it runs or was not asked for.
    """

    name: Literal["transformers", "unsloth"]
    reason: str
    refusal: str | None = None


def choose_backend(
    config: RunConfig,
    spec: ModelSpec,
    capability: tuple[int, int] | None,
    layers: Layers,
    import_failure: str | None = None,
) -> BackendChoice:
    """The backend of a run.

    Args:
        config: What the user wants.
        spec: The architecture.
        capability: Compute capability of the GPU; None without one.
        layers: What Laras would run without Unsloth.
        import_failure: Why Unsloth could not be imported, once that was tried.
    """
    own = "with Laras' fused layers" if layers == "fused" else "with its own layers"
    if config.backend == "transformers":
        return BackendChoice("transformers", "as configured")
    if config.backend == "auto" and not is_installed():
        return BackendChoice("transformers", own)
    refusals = [import_failure] if import_failure else unsloth_refusals(config, spec, capability)
    if config.backend == "unsloth":
        if not refusals:
            return BackendChoice("unsloth", "as configured")
        refusal = "; ".join(refusals)
        return BackendChoice("transformers", f"{own}: Unsloth was asked for, but {refusal}", refusal)
    if refusals:
        return BackendChoice("transformers", f"{own}; Unsloth is installed, but {'; '.join(refusals)}")
    return _faster(config, layers)


def _faster(config: RunConfig, layers: Layers) -> BackendChoice:
    """Unsloth where it was faster in every measured case that the configuration may come to; else the own layers."""
    quantised, checkpointing = config.load_in_4bit, config.gradient_checkpointing
    ratios = [
        case.own_tokens_per_s / case.unsloth_tokens_per_s
        for case in MEASURED
        if case.layers == layers and case.quantised in _open(quantised) and case.checkpointing in _open(checkpointing)
    ]
    if not ratios:
        return BackendChoice("transformers", f"{layers} layers: no measured figure says that Unsloth is faster here")
    low, high = min(ratios), max(ratios)
    if high < 1:
        return BackendChoice("unsloth", f"{1 / high:.1f} to {1 / low:.1f} times as fast as {layers} layers, measured")
    return BackendChoice("transformers", f"{layers} layers: {low:.1f} to {high:.1f} times as fast as Unsloth, measured")


def _open(value: bool | str) -> tuple[bool, ...]:
    return (value,) if isinstance(value, bool) else (False, True)


def unsloth_refusals(config: RunConfig, spec: ModelSpec, capability: tuple[int, int] | None) -> list[str]:
    """Every reason why Unsloth cannot build this run's layers, as far as that is known without importing it."""
    found = [*machine_refusals(capability), *_method_refusals(config)]
    if spec.model_type not in UNSLOTH_TYPES:
        known = ", ".join(sorted(UNSLOTH_TYPES))
        found.append(f"{spec.model_type} is not among the families that are trained through it ({known})")
    elif spec.fused_refusal is not None:
        found.append(f"this configuration of {spec.model_type} was not compared with it: {spec.fused_refusal}")
    elif config.max_length > (spec.fused_longest_tokens or config.max_length):
        found.append(
            f"a window of {spec.fused_longest_tokens} tokens is narrower than max_length {config.max_length}, which "
            "was not compared with it"
        )
    return found


def is_installed() -> bool:
    """Whether Unsloth can be found; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("unsloth", "unsloth_zoo"))


def machine_refusals(capability: tuple[int, int] | None) -> list[str]:
    """Those that lie in the machine and in how Laras was started."""
    found = []
    if not is_installed():
        found.append(f"it is not installed (pip install 'laras[unsloth]' brings {UNSLOTH_VERSION})")
    if capability is None:
        found.append("it needs an NVIDIA GPU")
    elif capability < _OLDEST_CAPABILITY:
        found.append(f"it needs compute capability 7.0, and this GPU has {capability[0]}.{capability[1]}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        found.append(f"it is used with one process, not with {processes}")
    return found


def _method_refusals(config: RunConfig) -> list[str]:
    refused = {
        "finetuning_type: full": config.finetuning_type == "full",
        "use_dora": config.use_dora,
        "load_in_8bit": config.load_in_8bit,
        "precision: fp32": config.precision == "fp32",
        "loss_kind: full": config.loss_kind == "full",
        f"attn_implementation: {config.attn_implementation}": config.attn_implementation != "auto",
        "full_determinism": config.full_determinism,
        "trust_remote_code": config.trust_remote_code,
    }
    if isinstance(config.lora_target_modules, tuple):
        others = sorted(set(config.lora_target_modules) - _TARGETS)
        refused[f"lora_target_modules: {', '.join(others)}"] = bool(others)
    return [f"{name} is not supported with it" for name, is_set in refused.items() if is_set]


def layers_of(is_fused: bool) -> Layers:
    """The name of Laras' own layers."""
    return "fused" if is_fused else "transformers"


def capability_of(hardware: HardwareSpec) -> tuple[int, int] | None:
    """Of the device planned for."""
    return hardware.compute_capability if hardware.kind == "cuda" else None
