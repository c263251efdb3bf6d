"""The architecture of a model, read from `config.json` alone.

Parameters are counted from the shapes that the architecture implies, so that a plan needs neither weights nor torch.
A family differs from the plain Llama decoder in a few traits (biases, norms, gate); an unknown family is counted as a
plain decoder with the biases that its configuration states.

Source: the modelling files of transformers 5.17; the counts equal those of its models on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laras.errors import ConfigError
from laras.hub import is_out_of_reach, reason_of
from laras.planning.layer_forms import FusedSupport, fused_support
from laras.record_base import digest_of
from laras.records import ModelSpec

_KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
}
# Models of state-space layers alone. In closed form each layer counts as a gated MLP of their width.
_ATTENTION_FREE_TYPES = frozenset({"falcon_mamba", "mamba", "mamba2"})
_KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INTERMEDIATE_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MAX_LAYERS, _MAX_SIZE = 10_000, 2**31 - 1
_MAX_NAME_BYTES = 255  # of one part of a path, on every common file system
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_NOT_CAUSAL = frozenset(
    [
        "albert",
        "bart",
        "bert",
        "bert-generation",
        "clip",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "longt5",
        "marian",
        "mbart",
        "mpnet",
        "mt5",
        "pegasus",
        "roberta",
        "siglip",
        "t5",
        "umt5",
        "vit",
        "wav2vec2",
        "whisper",
        "xlm-roberta",
    ]
)


@dataclass(frozen=True)
class Family:
    """How a family's shapes differ from the plain Llama decoder.

    Attributes:
        gated: Three matrices in the MLP instead of two.
        qkv_bias: Bias on query, key and value; None reads `attention_bias`.
        out_bias: Bias on the attention output; None reads `attention_bias`.
        mlp_bias: Bias on the MLP; None reads `mlp_bias`.
        norms: Hidden-sized norms in a layer.
        norm_bias: LayerNorm, with a bias, instead of RMSNorm.
        qk_norm: Head-sized norms on query and key.
        tied: Head shares the embedding where the configuration does not say.
        head_bias: Bias on the head.
        learned_positions: A learned position embedding.
        default_head_dim: Where the configuration does not say; None is hidden / heads.
    """

    gated: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    norms: int = 2
    norm_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    head_bias: bool = False
    learned_positions: bool = False
    default_head_dim: int | None = None


_LLAMA = Family()
_BIASED = Family(gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(qkv_bias=False, out_bias=False),
    "mixtral": Family(qkv_bias=False, out_bias=False),
    "qwen2": Family(qkv_bias=True, out_bias=False),
    "qwen3": Family(qk_norm=True, default_head_dim=128),
    "qwen3_moe": Family(qk_norm=True),
    "gemma": Family(tied=True, default_head_dim=256),
    "gemma2": Family(tied=True, norms=4, default_head_dim=256),
    "gemma3_text": Family(tied=True, norms=4, qk_norm=True, default_head_dim=256),
    "phi": Family(gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norms=1, norm_bias=True, head_bias=True),
    "phi3": Family(qkv_bias=False, out_bias=False),
    "gpt_neox": Family(gated=False, mlp_bias=True, norm_bias=True),
    "gpt2": Family(
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True, tied=True, learned_positions=True
    ),
    "smollm3": Family(tied=True),
    "starcoder2": Family(gated=False, norm_bias=True, tied=True),
}


def family_of(model_type: str) -> Family:
    """Traits of a model type; those of the plain Llama decoder for one that is not known."""
    return FAMILIES.get(model_type, _LLAMA)


def load_model_spec(source: str | Path, *, revision: str | None = None) -> ModelSpec:
    """Reads the architecture of a model.

    Args:
        source: A folder with a `config.json`, a bare configuration file, or a Hub id (one small file is fetched).
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: When there is no such path or model, the configuration names no `model_type` or lacks a size,
            or the model is not a causal language model.
    """
    return model_spec_from_config(read_model_config(source, revision=revision), str(source))


def read_model_config(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The parsed `config.json` of a model; see `load_model_spec`.

    Raises:
        ConfigError: There is none, or it is no JSON object.
    """
    path = _config_path(str(source), revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}", hint="name a model's config.json") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not an object", hint="name a model's config.json")
    return config


def model_spec_from_config(config: Mapping[str, Any], source: str) -> ModelSpec:
    """The architecture that a parsed `config.json` describes; counts are in parameters.

    Raises:
        ConfigError: See `load_model_spec`.
    """
    text = _text_config(config, source)
    model_type = str(text["model_type"])
    family = family_of(model_type)
    attends = model_type not in _ATTENTION_FREE_TYPES
    sizes = {name: _first(text, keys) for name, keys in _KEYS.items() if attends or name != "heads"}
    missing = [f"{' / '.join(_KEYS[name])} is missing or not a positive number" for name, n in sizes.items() if not n]
    missing += [f"{key} is {_number(value)}; the limit is {limit:,}" for key, value, limit in _oversized(text)]
    if missing:
        raise ConfigError(
            f"the configuration of {source} ({model_type}) lacks sizes",
            problems=missing,
            hint="name the config.json of a decoder-only language model",
        )
    layers, hidden, heads, vocab = (sizes.get(name, 0) for name in ("layers", "hidden", "heads", "vocab"))
    head_dim = _first(text, ("head_dim",)) or family.default_head_dim or hidden // max(1, heads)
    kv_heads = _first(text, _KV_KEYS) or (1 if text.get("multi_query") else heads)
    intermediate = _first(text, _INTERMEDIATE_KEYS) or (4 if attends else _first(text, ("expand",)) or 2) * hidden
    experts = _first(text, _EXPERT_KEYS)
    positions = _first(text, _POSITION_KEYS) or 2048
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied)))

    query, key_value = heads * head_dim, kv_heads * head_dim
    attention = 2 * hidden * query + 2 * hidden * key_value
    matrices = 3 if family.gated else 2
    expert_width = _first(text, ("moe_intermediate_size",)) or intermediate
    mlp_width = expert_width * experts if experts else intermediate
    linear = layers * (attention + matrices * hidden * mlp_width)
    embedding = vocab * hidden * (1 if tied else 2)
    small = layers * _small_per_layer(
        text, family, hidden=hidden, query=query, key_value=key_value, intermediate=intermediate, head_dim=head_dim
    )
    small += layers * experts * hidden  # the router
    small += hidden * (2 if family.norm_bias else 1) + (vocab if family.head_bias else 0)
    small += positions * hidden if family.learned_positions else 0
    fused = fused_support(text, head_dim) if text is config else FusedSupport("no fused layers for a part of a model")
    return ModelSpec(
        source=source,
        model_type=model_type,
        architecture=str(next(iter(config.get("architectures") or ()), model_type)),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=expert_width if experts else intermediate,
        attention_heads=heads,
        key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        experts=experts,
        experts_per_token=_first(text, ("num_experts_per_tok", "top_k_experts", "moe_k")) if experts else 0,
        total_parameters=linear + embedding + small,
        linear_parameters=linear,
        embedding_parameters=embedding,
        config_digest=digest_of(dict(config)),
        fused_refusal=fused.refusal,
        fused_longest_tokens=fused.longest_tokens,
    )


def _small_per_layer(
    text: Mapping[str, Any],
    family: Family,
    *,
    hidden: int,
    query: int,
    key_value: int,
    intermediate: int,
    head_dim: int,
) -> int:
    """Parameters of a layer's norms and biases."""
    default = family is FAMILIES["gpt_neox"]
    if text.get("model_type") == "starcoder2":
        stated, mlp_stated = bool(text.get("use_bias", True)), bool(text.get("use_bias", True))
    else:
        stated, mlp_stated = bool(text.get("attention_bias", default)), bool(text.get("mlp_bias", False))
    qkv_bias = stated if family.qkv_bias is None else family.qkv_bias
    out_bias = stated if family.out_bias is None else family.out_bias
    mlp_bias = mlp_stated if family.mlp_bias is None else family.mlp_bias
    total = family.norms * hidden * (2 if family.norm_bias else 1)
    total += 2 * head_dim if family.qk_norm else 0
    total += query + 2 * key_value if qkv_bias else 0
    total += hidden if out_bias else 0
    total += (2 if family.gated else 1) * intermediate + hidden if mlp_bias else 0
    return total


def _config_path(source: str, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.parts):
        raise ConfigError(f"no model at {source:.100}…", hint="name a folder, a config.json, or a Hub id")
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{source} holds no config.json", hint="name the folder that transformers saved")
        return path
    if path.is_file():
        return path
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".json")
    if looks_local:
        raise ConfigError(
            f"no model at {source}", hint="name a folder, a config.json, or a Hub id such as Qwen/Qwen2.5-1.5B"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    is_out_of_reach()
    try:
        return Path(hf_hub_download(source, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"no folder {source}, and the Hub gives no config.json for it: {reason_of(error)}",
            hint="check the name and the network; a gated model needs `hf auth login`",
        ) from None


def _text_config(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The language part of the configuration, checked to be a causal language model's."""
    if not config.get("model_type") or not isinstance(config["model_type"], str):
        raise ConfigError(
            f"the configuration of {source} has no model_type", hint="name the config.json that transformers saved"
        )
    if not isinstance(config.get("architectures") or [], list):
        raise ConfigError(
            f"`architectures` in the configuration of {source} is no list", hint="restore the model's config.json"
        )
    names = [str(name) for name in config.get("architectures") or ()]
    refused = config.get("is_encoder_decoder") or config["model_type"] in _NOT_CAUSAL
    if refused or (names and not any(name.endswith(_CAUSAL_SUFFIXES) for name in names)):
        raise ConfigError(
            f"{source} is {', '.join(names) or config['model_type']}, not a causal language model",
            hint="name a decoder-only model, one whose architecture ends in ForCausalLM",
        )
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    return {"model_type": f"{config['model_type']}_text", **nested}


def _oversized(config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Sizes beyond those of any model, with their limit: a plan for them would compute for ever."""
    limits = dict.fromkeys(_KEYS["layers"], _MAX_LAYERS) | dict.fromkeys(_EXPERT_KEYS, _MAX_LAYERS)
    sized = (*_KEYS["hidden"], *_KEYS["heads"], *_KEYS["vocab"], *_KV_KEYS, *_INTERMEDIATE_KEYS)
    limits |= dict.fromkeys((*sized, *_POSITION_KEYS, "head_dim", "moe_intermediate_size"), _MAX_SIZE)
    values = ((key, config.get(key), limit) for key, limit in limits.items())
    return [(key, value, limit) for key, value, limit in values if isinstance(value, int) and value > limit]


def _number(value: int) -> str:
    return f"{value:,}" if value < 10**18 else f"a number of {value.bit_length():,} bits"


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first positive whole number among the keys, or 0."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
