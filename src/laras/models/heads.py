"""Output heads that are one matrix product and nothing else, so that a loss can be computed in parts."""

from __future__ import annotations

from typing import Any

from torch import nn

# Architectures whose logits are `lm_head(hidden)`, without soft-capping, scaling or a second projection.
# Source: transformers 5.17, `modeling_<type>.py`.
PLAIN_HEAD_TYPES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "gemma", "smollm3", "olmo2"}
)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The head, when the logits are its plain product with the decoder's output; else None."""
    whole: Any = model
    causal = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if getattr(getattr(causal, "config", None), "model_type", None) not in PLAIN_HEAD_TYPES:
        return None
    head = causal.get_output_embeddings()
    return head if type(head) is nn.Linear else None
