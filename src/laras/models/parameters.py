"""The parameters of a model, counted on the model itself without its weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from laras.config import RunConfig
from laras.errors import LarasError
from laras.models.loader import load_model_config
from laras.planning.counts import ParameterCounts


def count_parameters(config: RunConfig) -> ParameterCounts:
    """Builds the model on the meta device, at full depth, and counts; a tied weight counts once.

    Raises:
        LarasError: The model cannot be built so.
    """
    architecture = load_model_config(
        config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                architecture, dtype=torch.bfloat16, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a model's own code can raise anything
        raise LarasError(f"{config.model_name_or_path} cannot be built without its weights: {error}") from error
    head = model.get_output_embeddings()
    embedded = {id(one.weight): one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    if head is not None:
        embedded[id(head.weight)] = head.weight
    weights = {id(one): one for one in model.parameters()}
    inner = [one.numel() for key, one in weights.items() if key not in embedded and one.ndim > 1]
    return ParameterCounts(
        total=sum(one.numel() for one in weights.values()),
        linear=sum(inner),
        embedding=sum(one.numel() for one in embedded.values()),
    )
