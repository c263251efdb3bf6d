"""A model as a GGUF file, for llama.cpp and what is built on it.

The families differ in little: Llama's and Mistral's queries and keys are reordered for llama.cpp's rotation of
neighbouring pairs, Gemma's norms are stored with the one added that its layers add, Phi's long rotations bring their
factors as tensors, and the experts of a mixture are stored gate and up apart.

Source: llama.cpp, convert_hf_to_gguf.py, classes LlamaModel, Qwen2Model, Qwen3Model, Qwen2MoeModel, Qwen3MoeModel,
Phi2Model, Phi3MiniModel, GemmaModel, Gemma2Model and Gemma3Model; docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laras.errors import ConfigError
from laras.reporting.gguf_tokenizer import write_tokenizer

Quantization = Literal["f16", "q8_0"]
_Q8_BLOCK = 32

# model_type of transformers → architecture of GGUF.
FAMILIES: dict[str, gguf.MODEL_ARCH] = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi": gguf.MODEL_ARCH.PHI2,  # Phi 1, 1.5 and 2
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
# Whether llama.cpp lets the weights of the chosen experts add up to one; a file cannot say it.
_NORMED_EXPERTS = {"qwen2_moe": False, "qwen3_moe": True}
# What chooses the experts is stored in float32.
_EXACT_KEYS = (".mlp.gate.weight", ".shared_expert_gate.weight")
_ROTATIONS = {"phi3": ("default", "longrope"), "phi": ("default",), "gemma": ("default",)}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def require_family(config: Any) -> gguf.MODEL_ARCH:
    """The GGUF architecture of a model.

    Raises:
        ConfigError: When the family, its kind of rotary embedding, or its mixture of experts is not one of those
            written here.
    """
    hint = "export with --format merged and convert it with llama.cpp's own script"
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"GGUF is written for {', '.join(sorted(FAMILIES))}, whose files are read back and compared; this model is "
            f"of type {config.model_type}",
            hint=hint,
        )
    kind = rope_parameters(config).get("rope_type", "default")
    if kind not in _ROTATIONS.get(config.model_type, ("default", "llama3")):
        raise ConfigError(f"GGUF with rotary embeddings of type {kind} is not written here", hint=hint)
    if config.model_type in ("phi", "gemma") and config.hidden_act not in _TANH_GELU:
        raise ConfigError(f"llama.cpp has no {config.model_type} with the activation {config.hidden_act}", hint=hint)
    if config.model_type == "phi" and config.qk_layernorm:
        raise ConfigError("llama.cpp has no phi with norms of queries and keys (qk_layernorm)", hint=hint)
    if has_experts(config):
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise ConfigError("GGUF of a model with experts in some layers only is not written here", hint=hint)
        if bool(config.norm_topk_prob) != _NORMED_EXPERTS[config.model_type]:
            raise ConfigError(
                f"llama.cpp has no {config.model_type} with norm_topk_prob {config.norm_topk_prob}", hint=hint
            )
    return FAMILIES[config.model_type]


def has_experts(config: Any) -> bool:
    """Whether a token chooses some of many experts, which the least rounding may make it choose otherwise."""
    return config.model_type in _NORMED_EXPERTS


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, quantization: Quantization) -> None:
    """Gives a model, in float32, the weights that a file of it holds."""
    for key, weight_XI in model.state_dict().items():
        if weight_XI.ndim < 2 or key.endswith(_EXACT_KEYS):
            continue
        if quantization == "q8_0" and weight_XI.shape[-1] % _Q8_BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(weight_XI.float().cpu().numpy(), kind)
            weight_XI.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
        else:
            weight_XI.copy_(weight_XI.half())


def is_described_whole(config: Any) -> bool:
    """Whether transformers' reader finds all that the model needs in the file; else it must be given `config`."""
    rope = rope_parameters(config)
    plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    return plain and not has_experts(config)


def rope_parameters(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embedding, of the layers with full attention where kinds differ."""
    parameters = dict(config.rope_parameters or {})
    return dict(parameters.get("full_attention", parameters))


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, quantization: Quantization, name: str
) -> None:
    """Writes weights, architecture, tokenizer and chat template.

    Args:
        model: Unquantised, without adapter.
        tokenizer: Its tokenizer.
        path: The file to write.
        quantization: Matrices as float16, or in blocks of 32 eight-bit numbers; vectors stay float32.
        name: Shown by tools that load the file.

    Raises:
        ConfigError: As `require_family` and `gguf_tokenizer`.
    """
    config: Any = model.config
    architecture = require_family(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    _write_architecture(writer, config, quantization)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings) and config.model_type != "phi"  # llama.cpp's has an output of its own
    for stored_key, tensor in model.state_dict().items():
        if tied and stored_key == "lm_head.weight":
            continue
        for key, values in _arranged(stored_key, tensor, config):
            gguf_name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ConfigError(f"the tensor {key} has no place in a GGUF file of type {config.model_type}")
            # The stacked matrices of the experts have no such ending in transformers.
            _add_tensor(writer, gguf_name + ".weight" * gguf_name.endswith("_exps"), values, quantization)
    for name_of_factors, factors in _rotation_factors(config):
        writer.add_tensor(f"{name_of_factors}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_frequency_factors(config: Any) -> npt.NDArray[np.float32]:
    """What llama.cpp divides each rotary frequency by, shape (head_dim / 2,).

    Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`: frequencies whose wave is longer than
    the old context are divided by the factor, short waves are kept, those between are blended.
    """
    rope = rope_parameters(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context, dim = rope["original_max_position_embeddings"], _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _write_architecture(writer: gguf.GGUFWriter, config: Any, quantization: Quantization) -> None:
    rope = rope_parameters(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "phi":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if has_experts(config):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.model_type == "qwen2_moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(longrope_attention_factor(config))


def _rotation_factors(config: Any) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """What llama.cpp divides the rotary frequencies by, where that is not one."""
    rope = rope_parameters(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs", llama3_frequency_factors(config)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long", np.asarray(rope["long_factor"], np.float32)
        yield "rope_factors_short", np.asarray(rope["short_factor"], np.float32)


def longrope_attention_factor(config: Any) -> float:
    """What the rotated queries and keys are multiplied by.

    Source: transformers, modeling_rope_utils.py, `_compute_longrope_parameters`.
    """
    rope = rope_parameters(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    old_context = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / old_context
    return math.sqrt(1 + math.log(factor) / math.log(old_context)) if factor > 1 else 1.0


def _arranged(key: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """A tensor of transformers as llama.cpp has it: one, or the parts that are stored apart."""
    values: npt.NDArray[np.float32] = tensor.detach().to(torch.float32).cpu().numpy()
    if key.endswith("experts.gate_up_proj"):  # (experts, 2 x intermediate, hidden), the gates first
        for part, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=1), strict=True):
            yield key.replace("gate_up_proj", part), half
        return
    if key.endswith("shared_expert_gate.weight"):
        values = values[0]
    if config.model_type in ("llama", "mistral"):
        if ".q_proj." in key:
            values = _interleaved(values, config.num_attention_heads)
        if ".k_proj." in key:
            values = _interleaved(values, config.num_key_value_heads)
    if config.model_type.startswith("gemma") and key.endswith("norm.weight"):
        values = values + 1
    yield key, values


def _interleaved(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of each head reordered: transformers rotates the first half against the second, llama.cpp neighbours."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], quantization: Quantization
) -> None:
    if values.ndim < 2 or ".ffn_gate_inp." in name:  # the choice of the experts is not to be rounded
        writer.add_tensor(name, np.ascontiguousarray(values))
    elif quantization == "q8_0" and values.shape[-1] % _Q8_BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype(np.float16))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
