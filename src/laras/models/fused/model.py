"""A whole decoder of fused layers over a transformers model with peft adapters, which keeps its parameters and forward.

Nothing of the model is replaced: its own forward serves generation, disabled or merged adapters, and everything that
the fused layers refuse. Shapes: B rows, T tokens, D hidden, N target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laras.data.masks import IGNORE_INDEX
from laras.models.fused import variant
from laras.models.fused.attention import Documents
from laras.models.fused.kernels import rms_norm_, rms_norm_backward_
from laras.models.fused.layer import FusedLayer
from laras.models.fused.lora import ADAPTER, LoraGroup
from laras.models.fused.loss import chunked_nll
from laras.models.fused.offload import HostInputs
from laras.models.fused.selfcheck import KernelSizes
from laras.planning.layer_forms import ACTIVATIONS, FUSED_TYPES, LAYER_FORMS, LayerForm, fused_support
from laras.progress import Observer

__all__ = ["FUSED_TYPES", "FusedModel", "fused_refusal", "kernel_sizes"]


class FusedModel:
    """Runs training steps of a PEFT model.

    Args:
        model: A `peft.PeftModel` for which `fused_refusal` is None.
        dtype: Of the arithmetic.
        checkpoint_kind: `none`, `selective`, `full` or `offload`; see `laras.models.fused.layer`.
        mlp_chunk: Tokens whose gate and up exist at once in a checkpointed layer.
        loss_chunk: Target tokens whose logits exist at once.
        longest_tokens: Longest document.
        observer: Is told what is slower than planned.
    """

    def __init__(
        self, model: Any, *, dtype: torch.dtype, checkpoint_kind: str, mlp_chunk: int, loss_chunk: int,
        longest_tokens: int, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self._causal = model.get_base_model()
        self._decoder = self._causal.base_model
        self._loss_chunk, self._longest_tokens = loss_chunk, longest_tokens
        config = self._causal.config
        form = LAYER_FORMS[config.model_type]
        self._observer = observer or Observer()
        self._inputs: HostInputs | None = None
        self.layers = [
            replace(_fused_layer(layer, config, form, dtype, checkpoint_kind, mlp_chunk), number=number)
            for number, layer in enumerate(self._decoder.layers)
        ]
        self.keep(checkpoint_kind)
        self._norm = _norm_weight(self._decoder.norm, form), config.rms_norm_eps
        self._spare = self.layers[-1].spare  # kept apart, as planning wraps the layers
        self._lora_layers = [one for layer in self.layers for group in layer.groups for one in group.layers]

    @property
    def offloads(self) -> bool:
        """Whether inputs of layers go to main memory."""
        return self._inputs is not None

    def keep(self, checkpoint_kind: str) -> None:
        """From now on the layers keep for backward what this kind says."""
        self._inputs = HostInputs(len(self.layers), self._observer) if checkpoint_kind == "offload" else None
        kind = "full" if self.offloads else checkpoint_kind
        self.layers = [replace(layer, checkpoint_kind=kind, inputs=self._inputs) for layer in self.layers]

    def refusal(self) -> str | None:
        """Why the adapters' present state needs the model's own forward; None when it does not."""
        if any(layer.disable_adapters or layer.merged for layer in self._lora_layers):
            return "adapters are disabled or merged"
        if any(layer.active_adapters != [ADAPTER] for layer in self._lora_layers):
            return "other adapters are active"
        return None

    def refresh(self, *, always: bool = False) -> None:
        """Takes over adapters, changed ones alone unless `always`."""
        for layer in self.layers:
            for group in layer.groups:
                group.refresh(always=always)

    def summed_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As `laras.models.step.summed_loss`; a padded row is a document, whose padding nothing attends to."""
        # A graph takes them over in every replay: issuing so many copies one by one takes longer than they do.
        self.refresh(always=torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        input_ids = batch["input_ids"]
        rows, length = input_ids.shape
        positions, cu_seqlens = batch.get("position_ids"), batch.get("cu_seqlens")
        longest, equal_rows = self._longest_tokens, None
        if cu_seqlens is None:
            longest, equal_rows = length, rows
            cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=input_ids.device)
            positions = torch.arange(length, device=input_ids.device).repeat(rows)[None]
        hidden_TD = self._decoder.embed_tokens(input_ids.view(-1)).detach()
        cos, sin = self._decoder.rotary_emb(hidden_TD, positions)
        documents = Documents(cu_seqlens, longest, cos[0], sin[0], equal_rows)
        if self._inputs is not None:
            self._inputs.begin(keeps=torch.is_grad_enabled())
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, documents)
        targets_T = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        places = batch.get("target_positions")
        if places is None:
            places = (targets_T != IGNORE_INDEX).nonzero().squeeze(1)
        head, (weight, eps) = self._causal.get_output_embeddings(), self._norm
        hidden_ND = _TargetNorm.apply(hidden_TD, places, weight, eps, self._spare)  # type: ignore[no-untyped-call]
        del hidden_TD
        return chunked_nll(hidden_ND, head.weight, head.bias, targets_T[places], self._loss_chunk)


class _TargetNorm(torch.autograd.Function):
    """The final norm at the places of targets; its gradient comes in the buffer that the layers go on to use."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, places_N: Tensor, weight_D: Tensor, eps: float, spare: int) -> Tensor:
        x_ND = hidden_TD[places_N]
        out = torch.empty_like(x_ND)
        rms_norm_(x_ND, weight_D, eps, out)
        ctx.x, ctx.places, ctx.weight, ctx.eps = x_ND, places_N, weight_D, eps
        ctx.tokens, ctx.spare = hidden_TD.shape[0], spare
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        width = ctx.x.shape[1]
        part_ND = torch.zeros_like(ctx.x)
        rms_norm_backward_(ctx.x, ctx.weight, ctx.eps, gradients[0], part_ND, None)
        ctx.x = None
        total_TD = part_ND.new_zeros(ctx.tokens, width + ctx.spare)[:, :width]
        total_TD.index_add_(0, ctx.places, part_ND)
        return total_TD, None, None, None, None


def fused_refusal(model: Any, longest_tokens: int) -> str | None:  # noqa: PLR0911 - one reason a line
    """Why a model cannot have fused layers, in one line; None when it can.

    Args:
        model: With adapters.
        longest_tokens: Longest document of a batch.
    """
    if not hasattr(model, "peft_config"):
        return "fused layers are for LoRA"
    causal = model.get_base_model()
    config = causal.config
    form = LAYER_FORMS.get(config.model_type)
    if form is None:
        return f"no fused layers for {config.model_type}"
    if type(causal).__module__ != f"transformers.models.{config.model_type}.modeling_{config.model_type}":
        return "no fused layers for a model's own code"
    first = causal.base_model.layers[0]
    refusal = fused_support(config.to_dict(), first.self_attn.head_dim).refusal_at(longest_tokens)
    if refusal is not None:
        return refusal
    if list(model.peft_config) != [ADAPTER]:
        return "fused layers are for one adapter named default"
    settings = model.peft_config[ADAPTER]
    if settings.lora_dropout or settings.use_dora or settings.bias != "none":
        return "no fused layers for adapter dropout, DoRA or trained biases"
    if any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name):
        return "base weights are trained"
    for layer in causal.base_model.layers:
        parts = (layer.self_attn, layer.mlp)
        linear = [getattr(part, name) for name in form.projections for part in parts if hasattr(part, name)]
        if len(linear) != len(form.projections) or not all(hasattr(one, "lora_A") for one in linear):
            return f"an adapter is missing on one of {', '.join(form.projections)}"
    return None


def kernel_sizes(model: Any, dtype: torch.dtype) -> KernelSizes:
    """What the fused layers of a model, for which `fused_refusal` is None, will ask of the kernels."""
    causal = model.get_base_model()
    config, decoder = causal.config, causal.base_model
    form, attention = LAYER_FORMS[config.model_type], decoder.layers[0].self_attn
    return KernelSizes(
        hidden=config.hidden_size,
        width=config.intermediate_size,
        heads=config.num_attention_heads,
        channels=attention.head_dim,
        rotated=2 * decoder.rotary_emb.inv_freq.shape[-1],
        activation=ACTIVATIONS[config.hidden_act],
        head_norm=form.head_norm,
        dtype=dtype,
        norm_dtype=torch.float32 if form.one_centred else decoder.norm.weight.dtype,
    )


def _norm_weight(norm: Any, form: LayerForm) -> Tensor:
    """What a norm multiplies by; its type says when it rounds, see `laras.models.fused.kernels`."""
    weight: Tensor = norm.weight.data
    return 1.0 + weight.float() if form.one_centred else weight


def _fused_layer(layer: Any, config: Any, form: LayerForm, dtype: torch.dtype, kind: str, chunk: int) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        qkv=LoraGroup([getattr(attention, name) for name in form.qkv], dtype),
        o=LoraGroup([attention.o_proj], dtype),
        gate_up=LoraGroup([getattr(mlp, name) for name in form.gate_up], dtype),
        down=LoraGroup([mlp.down_proj], dtype),
        input_norm=_norm_weight(layer.input_layernorm, form),
        middle_norm=_norm_weight(layer.post_attention_layernorm, form),
        query_norm=_norm_weight(attention.q_norm, form) if form.head_norm else None,
        key_norm=_norm_weight(attention.k_norm, form) if form.head_norm else None,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
        rotates=bool(getattr(attention, "use_rope", True)),
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        channels=attention.head_dim,
        width=mlp.down_proj.in_features,
        scale=attention.scaling,
        checkpoint_kind=kind,
        mlp_chunk=chunk,
        variant=variant.CHOSEN,
    )
