"""Models and tokenizers from a folder, the Hub or the built-in example; what cannot be trained is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_bitsandbytes_available

from laras.errors import ConfigError, MissingExtraError
from laras.hub import is_out_of_reach, reason_of
from laras.models.builtin import resolve_model, resolve_tokenizer
from laras.models.precision import torch_dtype
from laras.records import Precision

_MAX_NAME_BYTES = 255  # of one part of a path, on every common file system


def load_tokenizer(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, ready to pad.

    Args:
        source: Hub id, folder, or `builtin:…`.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that the repository brings.
        chat_template: Path of a Jinja file that replaces the tokenizer's own template.

    Raises:
        ConfigError: No such folder, Hub id or template file, or code of the repository is needed and not trusted.
    """
    place = _place(resolve_tokenizer(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file surfaces as whatever the first reader of it trips over
        raise _unloadable(source, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template {str(chat_template)!r:.200} cannot be read: {error!s:.200}",
                hint="give the path of a Jinja file in UTF-8",
            ) from None
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"chat_template {str(chat_template)!r} is not a file", hint="give the path of a Jinja file"
            )
    return tokenizer


def load_model_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The `config.json` of a causal language model; no weights are read.

    Raises:
        ConfigError: Nothing is there, code of the repository is needed and not trusted, or it is not a causal
            language model.
    """
    place = _place(resolve_tokenizer(source))
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unloadable(source, "model", error) from error
    _require_causal_lm(source, config, trust_remote_code)
    return config  # type: ignore[no-any-return]


def load_model(
    source: str,
    *,
    precision: Precision,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> PreTrainedModel:
    """A causal language model with its pretrained weights, on one device.

    Args:
        source: Hub id, folder, or `builtin:…`.
        precision: Format of the weights; of the arithmetic where they are quantised.
        device: Such as `cpu` or `cuda:1`.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that the repository brings.
        attention: Name of an attention implementation of transformers; None is its `sdpa` where the model has it.
        load_in_4bit: NF4 with doubly quantised constants, as QLoRA has it.
        load_in_8bit: LLM.int8().

    Raises:
        ConfigError: As `load_model_config`; or the weights are not safetensors.
        MissingExtraError: Quantisation is asked for and bitsandbytes is absent.

    Source: Dettmers et al., "QLoRA", arXiv:2305.14314, section 3.
    """
    config = load_model_config(source, revision=revision, trust_remote_code=trust_remote_code)
    quantization = _quantization(precision, load_in_4bit, load_in_8bit)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # the model and what was missing
            _place(resolve_model(source)),
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=torch_dtype(precision),
            attn_implementation=attention,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **({"quantization_config": quantization} if quantization else {}),
        )
    except (torch.OutOfMemoryError, MissingExtraError):
        raise
    except Exception as error:
        raise _unloadable(source, "model", error) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise ConfigError(
            f"the weights of model_name_or_path {source!r} lack {len(missing)} tensors, such as {missing[0]}",
            hint="download the model again; its safetensors files do not fit its config.json",
        )
    keep_4bit_exact(model)
    return model  # type: ignore[no-any-return]


def keep_4bit_exact(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU: rounded anew, and without a gradient.

    It does so at the first evaluation on CPUs with AVX512-BF16, so that a score would not be that of the trained model.

    Source: bitsandbytes 0.50.2, `nn.Linear4bit.forward`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute that torch.nn knows


def _quantization(precision: Precision, load_in_4bit: bool, load_in_8bit: bool) -> BitsAndBytesConfig | None:
    if not (load_in_4bit or load_in_8bit):
        return None
    if not is_bitsandbytes_available():
        raise MissingExtraError(
            "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed",
            hint="pip install 'laras[bnb]', or set both to false",
        )
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch_dtype(precision),
    }
    kind = {"load_in_8bit": True} if load_in_8bit else {"load_in_4bit": True, **nf4}
    return BitsAndBytesConfig(**kind)  # type: ignore[no-untyped-call]


def _place(source: str) -> str:
    """The source with `~` expanded; a path that does not exist is refused before it is taken for a Hub id."""
    path = Path(source).expanduser()
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.parts):
        raise ConfigError(
            f"model_name_or_path {source!r:.100} has a part of more than {_MAX_NAME_BYTES} bytes",
            hint="give a folder that has a config.json, or a Hub id",
        )
    if path.is_dir():
        return str(path)
    # A Hub id is `name` or `owner/name`, so anything else was meant as a path.
    if path.exists() or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        problem = "is a file, not a model folder" if path.exists() else "does not exist"
        raise ConfigError(
            f"model_name_or_path {source!r} {problem}", hint="give a folder that has a config.json, or a Hub id"
        )
    is_out_of_reach()
    return source


def _require_causal_lm(source: str, config: Any, trust_remote_code: bool) -> None:
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    known = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    is_causal = (
        not known.isdisjoint(architectures) if architectures else config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if not is_causal:
        what = ", ".join(architectures) or f"model_type {config.model_type}"
        raise ConfigError(
            f"model_name_or_path {source!r} is not a causal language model ({what})",
            hint="choose a model whose config.json names a …ForCausalLM architecture",
        )


def _names(values: Any) -> set[str]:
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


def _unloadable(source: str, what: str, error: Exception) -> ConfigError:
    text = str(error)
    if "trust_remote_code" in text:
        return ConfigError(
            f"model_name_or_path {source!r} brings Python code of its own, and trust_remote_code is false",
            hint="read that code, then set `trust_remote_code: true`",
        )
    is_local = Path(source).expanduser().exists() or source.startswith("builtin:")
    first_line = text.strip().partition("\n")[0] if is_local else reason_of(error)
    if not isinstance(error, OSError | ValueError):
        first_line = f"{type(error).__name__}: {first_line}"
    return ConfigError(
        f"the {what} of model_name_or_path {source!r} cannot be loaded: {first_line}",
        hint="check the name (a folder's is seen from the working folder), the network and access rights on the Hub; "
        "weights must be safetensors",
    )
