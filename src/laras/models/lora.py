"""Low-rank adapters: which layers get them, and attaching them the same way every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from laras.errors import ConfigError

# Of these, PEFT adapts no layer whose weight a kernel takes as it is.
# Source: peft 0.19 `tuners/tuners_utils.py`, `_check_lora_target_modules_mamba`.
_MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_MAMBA_KERNEL_LAYERS = frozenset({"conv1d", "out_proj"})


def linear_module_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the names of all linear layers except the output head, sorted; quantised layers count.

    Works on meta tensors too. Names that other modules have too are given in full: a classifier inside the decoder may
    be called as the head is, and one of a list of linear layers as a decoder layer is, by its number.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = {name for name, module in model.named_modules() if _is_plain_linear(module) and module is not head}
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in linear}
    names = {name if (last := name.rpartition(".")[2]) in others else last for name in linear}
    is_refused = getattr(model.config, "model_type", None) in _MAMBA_TYPES
    return tuple(sorted(names - _MAMBA_KERNEL_LAYERS if is_refused else names))


def _is_plain_linear(module: nn.Module) -> bool:
    """A router of experts may derive from a linear layer and return more than a product: no place for an adapter."""
    return isinstance(module, (nn.Linear, Conv1D)) and "router" not in type(module).__name__.lower()


def resolve_target_modules(model: PreTrainedModel, requested: str | Sequence[str]) -> tuple[str, ...]:
    """The layers that get adapters: all linear ones for `auto` and `all-linear`, or the requested names.

    Raises:
        ConfigError: With every requested name that no linear layer of the model has, or only its head, whose weight the
            loss takes as it is.
    """
    available = linear_module_names(model)
    if isinstance(requested, str) and requested in ("auto", "all-linear"):
        return available
    names = (requested,) if isinstance(requested, str) else tuple(requested)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    absent = [name for name in names if not any(full == name or full.endswith(f".{name}") for full in linear)]
    if absent:
        raise ConfigError(
            f"lora_target_modules {', '.join(absent)} not found among the layers that take adapters",
            hint=f"these are: {', '.join(available)}",
        )
    return names


def attach_lora(
    model: PreTrainedModel,
    *,
    target_modules: Sequence[str],
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int,
) -> Any:
    """Freezes the model and adds trainable adapters in float32 to the target layers.

    The adapters depend on the seed alone, and the global random state is left as it was.

    Args:
        model: The base model, quantised or not; changed in place.
        target_modules: As `resolve_target_modules` gives them.
        r: Rank.
        alpha: The update is scaled by alpha / r, with rsLoRA by alpha / sqrt(r).
        dropout: Of the adapters' input, in [0, 1).
        use_rslora: Rank-stabilised scaling.
        use_dora: Weight-decomposed adapters.
        seed: Of the initialisation.

    Returns:
        The `peft.PeftModel`; before the first step it computes what the base model computes.

    Source: Hu et al., arXiv:2106.09685; Kalajdzievski (rsLoRA), arXiv:2312.03732; Liu et al. (DoRA), arXiv:2402.09353.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        # Of a model without weights, adapters need none either: those of 8B take seconds to fill with random numbers.
        is_planned = all(parameter.is_meta for parameter in model.parameters())
        return get_peft_model(model, config, low_cpu_mem_usage=is_planned)
