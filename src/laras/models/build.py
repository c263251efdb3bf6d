"""A model that is ready to train as the plan says: weights, adapter, and the path on which its steps run."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from laras.config import RunConfig
from laras.models import unsloth
from laras.models.attention import VARLEN, register_attention
from laras.models.fused.model import FusedModel, fused_refusal, kernel_sizes
from laras.models.fused.selfcheck import disagreement
from laras.models.loader import load_model, load_model_config
from laras.models.lora import attach_lora, resolve_target_modules
from laras.models.precision import torch_dtype
from laras.models.quantized_meta import quantize_on_meta
from laras.models.step import ExecutionPath
from laras.progress import Observer
from laras.records import PlanChoices

_WORTH_SAYING_S = 1.0  # Triton keeps what it has compiled, so a second run has nothing to say


def build_model(config: RunConfig, choices: PlanChoices, device: str, observer: Observer) -> Any:
    """Loads the base, attaches the adapter and applies the execution path of the plan.

    Args:
        config: Names the model and the seed of the adapter.
        choices: The plan.
        device: Such as `cpu` or `cuda:0`; `meta` builds the same without weights.
        observer: Is told the path and why.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    if choices.backend == "unsloth":
        return _unsloth_model(config, choices, observer)
    register_attention()
    model = _base(config, choices, device)
    if choices.finetuning_type == "lora":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        named = choices.target_modules
        wanted = "all-linear" if named == ("all-linear",) else named
        model = attach_lora(
            model,
            target_modules=resolve_target_modules(model, wanted),
            r=choices.lora_r,
            alpha=choices.lora_alpha,
            dropout=choices.lora_dropout,
            use_rslora=choices.use_rslora,
            use_dora=choices.use_dora,
            seed=config.seed,
        )
        for parameter in model.parameters():  # peft leaves adapters on meta in the base's type
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
    model.laras_path = _path(model, choices, observer)
    if model.laras_path.fused is None and choices.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return model


def _unsloth_model(config: RunConfig, choices: PlanChoices, observer: Observer) -> Any:
    model = unsloth.build_layers(config, choices)
    model.laras_path = ExecutionPath(
        None, "as planned", "chunked", choices.loss_chunk_tokens, choices.max_length, _low(choices),
        hidden_states=unsloth.hidden_states,
    )  # fmt: skip
    observer.message("layers of Unsloth")
    model.train()
    return model


def _base(config: RunConfig, choices: PlanChoices, device: str) -> Any:
    attention: str | None = VARLEN if choices.packing and choices.attention == "sdpa" else choices.attention
    if config.attn_implementation == "auto" and attention == "sdpa":
        attention = None  # a few old architectures have their own attention only
    if device != "meta":
        return load_model(
            config.model_name_or_path,
            precision=choices.precision,
            device=device,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            attention=attention,
            load_in_4bit=choices.load_in_4bit,
            load_in_8bit=choices.load_in_8bit,
        )
    model = bare_model(config, torch_dtype(choices.precision), attention)
    if choices.load_in_4bit or choices.load_in_8bit:
        quantize_on_meta(model, "nf4" if choices.load_in_4bit else "int8", torch_dtype(choices.precision))
    return model


def bare_model(config: RunConfig, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """The base on the meta device, without weights, as transformers builds it.

    Raises:
        ConfigError: The model's configuration cannot be loaded.
    """
    architecture = load_model_config(
        config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )


def _path(model: nn.Module, choices: PlanChoices, observer: Observer) -> ExecutionPath:
    refusal = fused_refusal(model, choices.max_length) if choices.fused_layers else "as planned"
    if refusal is None and choices.loss_kind == "full":
        refusal = "the plan keeps full logits"
    started = time.monotonic()
    if refusal is None:
        refusal = _kernel_refusal(model, choices)
    kernels_s = time.monotonic() - started
    if refusal is not None:
        observer.message(f"layers of transformers: {refusal}")
        longest = choices.max_length if choices.packing else None
        return ExecutionPath(None, refusal, choices.loss_kind, choices.loss_chunk_tokens, longest, _low(choices))
    kind: str = "none"
    if choices.gradient_checkpointing:
        kind = "full" if choices.checkpoint_kind == "none" else choices.checkpoint_kind
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu:
        _leave_file(model)
    fused = FusedModel(
        model,
        dtype=torch_dtype(choices.precision),
        checkpoint_kind=kind,
        mlp_chunk=choices.mlp_chunk_tokens,
        loss_chunk=choices.loss_chunk_tokens,
        longest_tokens=choices.max_length,
        observer=observer,
    )
    if on_cpu:
        _return_freed_memory()
    compiled = f"; kernels compiled and compared in {kernels_s:.0f} s" if kernels_s >= _WORTH_SAYING_S else ""
    observer.message(f"fused layers, checkpointing: {kind}{compiled}")
    return ExecutionPath(fused, None, "chunked", choices.loss_chunk_tokens, choices.max_length)


def _low(choices: PlanChoices) -> torch.dtype | None:
    """What autocast lowers products to; None where everything is in fp32."""
    return torch_dtype(choices.precision) if choices.precision != "fp32" else None


def _leave_file(model: Any) -> None:
    """Copies the weights that the fused layers will not: embeddings, norms and biases.

    Weights are read through a map of their whole file, all of which is resident as long as one of them is left in it.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(parameter) for end in ends for parameter in end.parameters()}
    for parameter in model.parameters():
        if parameter.dim() < 2 or id(parameter) in kept:
            parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """The C library keeps what the weights were loaded into before the fused layers copied them, unless it is asked.

    Source: glibc `malloc_trim`; a model of 135M parameters holds 404 MiB less after it.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kernel_refusal(model: Any, choices: PlanChoices) -> str | None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or choices.precision != "bf16":
        return "fused layers on a GPU are for bf16"
    from laras.models.fused.triton_kernels import triton_works

    if not triton_works(device):
        return "Triton does not run here"
    return disagreement(kernel_sizes(model, torch_dtype(choices.precision)), device)
