"""What a run is, and the refusal to go on with another one under its name.

A checkpoint holds the identity of its run: everything that the weights, the losses and the choice of the best model
depend on, as it was planned and as the configuration asks for it, for an edited configuration changes no plan. What is
not in it may change between stop and resume: trackers, logging and saving intervals and limits, `save_total_limit`,
evaluation batch, gradient checkpointing, number of processes, and without packing the micro-batch, as long as the
effective batch stays.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from laras.config import RunConfig
from laras.errors import ConfigError, RunStateError
from laras.models.builtin import resolve_model
from laras.record_base import digest_of
from laras.records import TrainPlan
from laras.training.state import read_state

Identity = dict[str, Any]  # plain values by name; None where it could not be found out

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_MAY_BE_UNKNOWN = ("model_weights", "model_config")  # to a session without the files, or to an older version
_NOTES_OF_A_CONFIG = ("transformers_version", "_name_or_path")
_FREE_KEYS = {
    "profile", "model_name_or_path", "model_revision", "trust_remote_code", "output_dir", "run_name", "report_to",
    "logging_steps", "save_steps", "save_total_limit", "max_skipped_steps", "gpu", "memory_budget_fraction",
    "gradient_checkpointing", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "cuda_graph",
}  # fmt: skip
_HUB_DIGEST_CHARS = 64  # the Hub's cache names a file by its SHA-256


def identity_of(
    config: RunConfig,
    plan: TrainPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_sha256: str,
    validation_sha256: str,
    start_sha256: str | None = None,
) -> Identity:
    """The identity of a run.

    Args:
        config: Of the run.
        plan: Of the run.
        tokenizer: With the chat template that is saved beside the weights.
        train_sha256: `laras.data.store.tokens_digest` of the training split.
        validation_sha256: The same of the validation split.
        start_sha256: Of the weights of another run that this one started from.
    """
    choices = plan.choices
    micro_batches = choices.gradient_accumulation_steps
    packed = {"packed_bin_tokens": choices.packed_tokens} if choices.packing else {}
    method = {
        name: getattr(choices, name)
        for name in ("finetuning_type", "load_in_4bit", "load_in_8bit", "precision", "optim", "learning_rate")
    }
    adapter = {
        name: getattr(choices, name) for name in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    }
    optimization = {
        name: getattr(config, name)
        for name in (
            "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
            "early_stopping_patience", "early_stopping_min_delta", "seed",
        )
    }  # fmt: skip
    return {
        "train_data": train_sha256,
        "validation_data": validation_sha256,
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": digest_of(tokenizer.chat_template) if tokenizer.chat_template else None,
        "model_weights": weights_digest(config.model_name_or_path, config.model_revision),
        "model_config": _config_digest(config.model_name_or_path, config.model_revision),
        "effective_batch": choices.per_device_train_batch_size * micro_batches,
        "packing": choices.packing,
        **packed,
        "eval_steps": choices.eval_steps,
        **method,
        **({"backend": choices.backend} if choices.backend != "transformers" else {}),  # as other checkpoints have none
        **({"start_weights": start_sha256} if start_sha256 else {}),
        **(adapter if choices.finetuning_type == "lora" else {}),
        "target_modules": sorted(choices.target_modules),
        **optimization,
        "config": config.model_dump(mode="json", exclude=_FREE_KEYS),
    }


def check_resume(checkpoint: Path, current: Identity) -> None:
    """Refuses a resume of a run that is no longer the one of the checkpoint.

    Raises:
        RunStateError: With every field that changed, its old and its new value.
        CheckpointError: When the checkpoint's state is of another version.
    """
    saved: Identity = read_state(checkpoint)["identity"]
    # An older version kept no configuration. Where both differ, the planned value is the one that was in force.
    asked = _changes(saved.get("config") or current["config"], current["config"])
    planned = _changes(*({key: value for key, value in one.items() if key != "config"} for one in (saved, current)))
    if problems := [text for _, text in sorted((asked | planned).items())]:
        raise RunStateError(
            f"the run has changed since {checkpoint.name}",
            problems=problems,
            hint="undo the change, or go on with it on purpose in a new run: "
            f"`laras train CONFIG --from {checkpoint.parent.parent}` starts from these weights",
        )


def _changes(saved: Identity, current: Identity) -> dict[str, str]:
    """Name of what changed → the old and the new value."""
    changes = {}
    for name in saved.keys() | current.keys():
        old, new = saved.get(name), current.get(name)
        if old != new and not (name in _MAY_BE_UNKNOWN and None in (old, new)):
            changes[name] = f"{name}: was {_shown(old)}, is {_shown(new)}"
    return changes


def weights_digest(source: str, revision: str | None = None) -> str | None:
    """SHA-256 over the weight files of a model that is on this machine; None where there are none to be seen."""
    folder = _folder_of(source, revision)
    if folder is None:
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    return digest_of([(path.name, _file_digest(path)) for path in files]) if files else None


def _config_digest(source: str, revision: str | None) -> str | None:
    """Of what `config.json` makes of the weights; None where there is none to be seen."""
    folder = _folder_of(source, revision)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return digest_of({key: value for key, value in values.items() if key not in _NOTES_OF_A_CONFIG})


def _folder_of(source: str, revision: str | None) -> Path | None:
    """Where the files of a model are on this machine."""
    try:
        place = resolve_model(source)
        folder = Path(place).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(place, revision=revision, local_files_only=True))
    except (ConfigError, HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return folder


def _file_digest(path: Path) -> str:
    stored_as = path.resolve().name
    if path.is_symlink() and len(stored_as) == _HUB_DIGEST_CHARS:
        return stored_as
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if isinstance(content, dict):  # what a call leaves behind says nothing about the tokenizer
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return digest_of([content, tokenizer.special_tokens_map])


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) == _HUB_DIGEST_CHARS else text
