"""Every architecture that plans may pack keeps documents apart: none sees, or moves, another's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from laras.models.attention import VARLEN, register_attention
from laras.models.step import target_losses
from laras.planning.candidates import PACKABLE_TYPES

LENGTHS = (7, 13, 12)
# What the architectures call their sizes; each takes those that it has. The window is shorter than the documents.
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 5, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64, "query_pre_attn_scalar": 8,
}  # fmt: skip


def tiny(model_type: str) -> Any:
    usual = AutoConfig.for_model(model_type).to_dict()
    sizes = {key: value for key, value in SHAPE.items() if key in usual}
    layers = SHAPE["num_hidden_layers"]
    if kinds := list(dict.fromkeys(usual.get("layer_types") or ())):  # each kind of attention in turn
        sizes["layer_types"] = (kinds * layers)[:layers]
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def packed_losses(model: Any, documents: list[Tensor]) -> list[Tensor]:
    """Losses of each document, all of them in one row with unused slots behind."""
    ids = torch.cat(documents)[None]
    labels = ids.clone()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    labels[0, starts[:-1]] = -100
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seqlens": torch.cat([starts, starts[-1:]]).int(),
    }
    # With gradients, as in training: the path that packs.
    return list(target_losses(model, batch).nll_N.detach().split([length - 1 for length in LENGTHS]))


@pytest.mark.parametrize("model_type", sorted(PACKABLE_TYPES))
def test_packed_documents_score_as_they_do_alone_and_do_not_see_each_other(model_type: str) -> None:
    register_attention()
    model = tiny(model_type)
    documents = [torch.randint(3, 60, (length,)) for length in LENGTHS]
    together = packed_losses(model, documents)
    for document, found in zip(documents, together, strict=True):
        row = document[None]
        alone = target_losses(model, {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)})
        assert torch.allclose(found, alone.nll_N.detach(), atol=1e-5, rtol=1e-5)
    changed = packed_losses(model, [documents[0], torch.randint(3, 60, (LENGTHS[1],)), documents[2]])
    assert torch.equal(changed[0], together[0]) and not torch.equal(changed[1], together[1])
    assert torch.allclose(changed[2], together[2], atol=1e-6)
