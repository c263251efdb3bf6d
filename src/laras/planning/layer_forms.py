"""Which decoder layers have a fused version (`laras.models.fused`), from `config.json` alone.

Planning and the layers themselves ask the same function, so that what is planned is what runs. A family is described by
how its layer differs from Llama's; what a configuration asks for beyond that keeps the layers of transformers.

Source: `modeling_<type>.py` and `configuration_<type>.py` of transformers 5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Rotations whose angles depend on the position alone; of the others, longrope does below a length.
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
_MOST_CHANNELS = 256  # of a head, in the attention kernel


@dataclass(frozen=True)
class LayerForm:
    """How a family's decoder layer differs from Llama's.

    Attributes:
        qkv: The linear layers that give query, key and value, in this order.
        gate_up: Those that give gate and up.
        head_norm: Query and key are normed head by head before they are rotated.
        one_centred: Norms multiply by 1 + weight, in float32.
        activation: Of the gate, where the configuration does not say.
        window: Whether attention slides: never, as far as `sliding_window` says, or only with `use_sliding_window`.
        default_window: `sliding_window` where the configuration does not say.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    head_norm: bool = False
    one_centred: bool = False
    activation: str = "silu"
    window: Literal["never", "stated", "switched"] = "never"
    default_window: int | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """Every linear layer, each of which needs an adapter."""
        return (*self.qkv, "o_proj", *self.gate_up, "down_proj")


LAYER_FORMS: dict[str, LayerForm] = {
    "gemma": LayerForm(one_centred=True, activation="gelu_pytorch_tanh"),
    "llama": LayerForm(),
    "mistral": LayerForm(window="stated", default_window=4096),
    "phi3": LayerForm(qkv=("qkv_proj",), gate_up=("gate_up_proj",), window="stated"),
    "qwen2": LayerForm(window="switched", default_window=4096),
    "qwen3": LayerForm(head_norm=True, window="switched", default_window=4096),
    "smollm3": LayerForm(window="switched"),  # some of its layers do not rotate, which the layer itself says
}
FUSED_TYPES = frozenset(LAYER_FORMS)


@dataclass(frozen=True)
class FusedSupport:
    """Whether the layers of a configuration can be fused.

    Attributes:
        refusal: Why they cannot, in one line; None when they can.
        longest_tokens: Longest document that they take; None is any.
        limit: What a longer document would need.
    """

    refusal: str | None = None
    longest_tokens: int | None = None
    limit: str = ""

    def refusal_at(self, longest_tokens: int) -> str | None:
        """Why there are no fused layers for documents of up to that length; None when there are."""
        if self.refusal is None and self.longest_tokens is not None and longest_tokens > self.longest_tokens:
            return (
                f"no fused layers for {self.limit}: documents of {longest_tokens} tokens, at most {self.longest_tokens}"
            )
        return self.refusal


def fused_support(config: Mapping[str, Any], head_dim: int) -> FusedSupport:
    """What a model's configuration allows.

    Args:
        config: As read from `config.json`, or as transformers completes it.
        head_dim: Channels of a head.
    """
    form = LAYER_FORMS.get(str(config.get("model_type")))
    if form is None:
        return FusedSupport(f"no fused layers for {config.get('model_type')}")
    activation = str(config.get("hidden_act", form.activation))
    if activation not in ACTIVATIONS:
        return FusedSupport(f"no fused layers for the activation {activation}")
    dropped = [key for key in _DROPOUTS if config.get(key)]
    if dropped:
        return FusedSupport(f"no fused layers for {dropped[0]} {config[dropped[0]]}")
    if config.get("use_bidirectional_attention"):
        return FusedSupport("no fused layers for bidirectional attention")
    if head_dim % 8 or head_dim > _MOST_CHANNELS:
        return FusedSupport(f"no fused layers for heads of {head_dim} channels")
    return _limited(config, form)


def _limited(config: Mapping[str, Any], form: LayerForm) -> FusedSupport:
    """By what depends on the length: a window narrower than a document, and rotations that change with it."""
    types = config.get("layer_types") or ()
    if not isinstance(types, list | tuple) or not _LAYER_TYPES.issuperset(map(str, types)):
        return FusedSupport("no fused layers for its layer_types")
    slides = form.window == "stated" or bool(config.get("use_sliding_window")) or "sliding_attention" in types
    window = config.get("sliding_window", form.default_window) if slides else None
    if window is not None and not (isinstance(window, int) and window > 0):
        return FusedSupport(f"no fused layers for sliding_window {window}")
    support = FusedSupport(None, window, "sliding-window attention")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, Mapping) else str(rope)
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as transformers reads them
    if kind in _STATIC_ROPES:
        return support
    if kind != "longrope" or not isinstance(rope, Mapping):
        return FusedSupport(f"no fused layers for the rotation {kind}")
    longest = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if not isinstance(longest, int):
        return FusedSupport("no fused layers for longrope without original_max_position_embeddings")
    return support if window is not None and window <= longest else FusedSupport(None, longest, "longrope")
