"""A GGUF file of a family that transformers' reader does not know, read back from nothing but the file.

Sizes and constants come from the file's fields, weights from its tensors, and the model is transformers' own: a wrong
field, a missing tensor or a lost transformation changes the logits that an export is checked by.

Source: llama.cpp, convert_hf_to_gguf.py, classes GemmaModel and Phi2Model, read in the other direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from laras.errors import CheckpointError

# Architecture of GGUF → model_type of transformers.
_MODEL_TYPES = {"gemma": "gemma", "phi2": "phi"}
READ_HERE = frozenset(_MODEL_TYPES.values())
_HINT = "please report this with the model's name"
_TANH_GELU = "gelu_pytorch_tanh"  # what llama.cpp computes for both; a file does not say it


def read_gguf(path: Path) -> PreTrainedModel:
    """The model in a file, in float32.

    Raises:
        CheckpointError: The file lacks a field or a tensor, or holds a tensor that the model has no place for.
    """
    reader = gguf.GGUFReader(path)
    try:
        architecture = str(reader.get_field("general.architecture").contents())
        config: Any = AutoConfig.for_model(_MODEL_TYPES[architecture], **_sizes(_Fields(reader, architecture)))
    except KeyError as error:
        raise CheckpointError(f"{path} has no field {error.args[0]}", hint=_HINT) from None
    if architecture == "gemma" and config.rope_parameters["partial_rotary_factor"] != 1:  # transformers rotates all
        raise CheckpointError(f"{path} says that a part of each head is rotated; gemma rotates all of it", hint=_HINT)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config.tie_word_embeddings = "output.weight" not in stored
    config.vocab_size = int(stored["token_embd.weight"].shape[-1])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None or name not in stored:
                raise CheckpointError(f"{path} has no tensor for {key}", hint=_HINT)
            tensor = stored.pop(name)
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            parameter.copy_(values - 1 if architecture == "gemma" and key.endswith("norm.weight") else values)
    if stored:
        raise CheckpointError(f"{path} holds tensors that have no place: {', '.join(sorted(stored))}", hint=_HINT)
    return model


class _Fields:
    """Values of an architecture's fields."""

    def __init__(self, reader: gguf.GGUFReader, architecture: str) -> None:
        self._reader, self._architecture = reader, architecture

    def __getitem__(self, name: str) -> Any:
        field = self._reader.get_field(f"{self._architecture}.{name}")
        if field is None:
            raise KeyError(name)
        return field.contents()

    def __contains__(self, name: str) -> bool:
        return self._reader.get_field(f"{self._architecture}.{name}") is not None


def _sizes(fields: _Fields) -> dict[str, Any]:
    head_dim = fields["attention.key_length"]
    sizes = {
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "max_position_embeddings": fields["context_length"],
        "head_dim": head_dim,
        "hidden_act": _TANH_GELU,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields["rope.freq_base"],
            "partial_rotary_factor": fields["rope.dimension_count"] / head_dim,
        },
    }
    if "attention.layer_norm_rms_epsilon" in fields:
        return sizes | {"rms_norm_eps": fields["attention.layer_norm_rms_epsilon"]}
    return sizes | {"layer_norm_eps": fields["attention.layer_norm_epsilon"]}
