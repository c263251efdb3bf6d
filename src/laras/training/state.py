"""Everything that a resume needs beside the weights, as safetensors and JSON: nothing is ever unpickled.

optimizer.safetensors   tensors of the optimizer's state
training.json           its other values, schedule, scaler, random states of every process, counters, identity
trainer_state.json      upstream's own counters (transformers `TrainerState`)
adapter_model.safetensors or model.safetensors, with their configuration and the tokenizer
"""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from laras.errors import CheckpointError
from laras.training.numbers import LossWatch, Stopping
from laras.training.optimizers import inner_of, is_bitsandbytes, page_states, settle
from laras.whole_folder import MANIFEST_NAME, write_whole

ADAPTER_NAME, MODEL_NAME = "adapter_model.safetensors", "model.safetensors"
OPTIMIZER_NAME, STATE_NAME = "optimizer.safetensors", "training.json"
STATE_FILES = (OPTIMIZER_NAME, STATE_NAME, "trainer_state.json", MANIFEST_NAME)  # not part of a model


@dataclass
class Counters:
    """What the training loop counts. Saved with every checkpoint."""

    stopping: Stopping
    losses: LossWatch = field(default_factory=LossWatch)
    window_loss: float = 0.0  # sum of the step losses since the last log
    window_steps: int = 0
    loss_sum: float = 0.0  # over the steps that were not skipped
    loss_steps: int = 0
    tokens: int = 0  # without padding, over all processes
    skipped_in_a_row: int = 0
    split_level: int = 0  # micro-batches are cut to 1 / 2^level of the planned size
    eval_split_level: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stopped: bool = False  # early
    evaluation_due: bool = False  # the step is done, its evaluation is not
    events: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counters:
        """The inverse of `to_json`."""
        nested = {"stopping": Stopping(**values["stopping"]), "losses": LossWatch(**values["losses"])}
        return cls(**{**values, **nested})


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """Writes the tensors of an optimizer's state to a file and returns its other values.

    A state may hold tensors by name, or, as that of the 8-bit optimizers, in a dictionary below one.
    """
    settle(inner_of(optimizer))
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}

    def plain(place: str, entries: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in entries.items():
            inside = f"{place}/{name}"
            if isinstance(value, Tensor):
                tensors[inside] = value.detach().to("cpu", copy=True).contiguous()  # some are shared
            else:
                kept[name] = plain(inside, value) if isinstance(value, dict) else value
        return kept

    values = {str(number): plain(str(number), entries) for number, entries in state["state"].items()}
    save_file(tensors, path)
    return {"groups": state["param_groups"], "values": values}


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, rest: dict[str, Any]) -> None:
    """Gives an optimizer of the same parameters the state that `save_optimizer` saved."""
    state: dict[int, dict[str, Any]] = {int(number): deepcopy(values) for number, values in rest["values"].items()}
    for key, tensor in load_file(path).items():
        number, *parents, name = key.split("/")
        entries = state.setdefault(int(number), {})
        for parent in parents:
            entries = entries.setdefault(parent, {})
        entries[name] = tensor
    groups = [
        # JSON has no tuples; the optimizer's own values say where one was.
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}
        for group, own in zip(rest["groups"], optimizer.param_groups, strict=True)
    ]
    saved, inner = {"state": state, "param_groups": groups}, inner_of(optimizer)
    if is_bitsandbytes(inner):  # what is to be paged does not pass through the device's own memory
        inner.load_state_dict(saved, move_to_device=False)
        page_states(inner)
        inner.to_gpu()
    else:
        optimizer.load_state_dict(saved)


def random_states() -> dict[str, Any]:
    """This process' random states of Python, numpy, torch and its GPU, as plain values."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    states = {
        "python": [version, list(internal), gauss],
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`; a GPU's is left alone where there was none."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = states["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def write_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Adapter, or all weights, with configuration, tokenizer and chat template."""
    whole: Any = model
    if isinstance(model, PeftModel):
        whole.save_pretrained(folder, save_embedding_layers=False)  # no adapter is on an embedding: no look at the Hub
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    else:
        whole.save_pretrained(folder, max_shard_size="100TB")  # one file
    tokenizer.save_pretrained(str(folder))


def publish_model(checkpoint: Path, folder: Path) -> None:
    """Copies the model of a checkpoint to a folder, whole or absent, without what only a resume needs."""

    def copy(aside: Path) -> None:
        shutil.copytree(checkpoint, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*STATE_FILES))

    write_whole(folder, copy)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Gives a model of the same shape the weights that `write_model` wrote.

    Raises:
        CheckpointError: When they do not fit the model.
    """
    is_adapter = isinstance(model, PeftModel)
    weights = load_file(folder / (ADAPTER_NAME if is_adapter else MODEL_NAME))
    try:
        if is_adapter:
            expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            unexpected: list[str] = sorted(set(weights) ^ expected)
            set_peft_model_state_dict(model, weights)
        else:
            unexpected = model.load_state_dict(weights, strict=False).unexpected_keys  # tied weights are absent
    except RuntimeError as error:
        raise _misfit(folder, str(error).splitlines()[0]) from error
    if unexpected:
        raise _misfit(folder, f"{len(unexpected)} tensors differ, such as {unexpected[0]}")


def write_state(folder: Path, values: dict[str, Any]) -> None:
    """Writes `training.json`."""
    (folder / STATE_NAME).write_text(json.dumps(values), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Reads `training.json`.

    Raises:
        CheckpointError: When it is of another version.
    """
    try:
        values: dict[str, Any] = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        Counters.from_json(values["counters"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder.name}/{STATE_NAME} is not a state that this Laras knows: {error}",
            hint="resume with the version of Laras that wrote it, or start a new run",
        ) from None
    return values


def _misfit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the weights in {folder.name} are not those of this model: {reason}",
        hint="resume with the model, rank and target modules that the run was started with",
    )


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
