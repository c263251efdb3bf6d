"""Unsloth's layers under Laras' own step; the only module that imports Unsloth.

Unsloth replaces parts of torch, transformers, peft and trl as it is imported, and has to come before them, so this
module imports none of them itself until it builds a model. Of Unsloth it takes the loaded layers, its adapters'
arithmetic and its checkpointing. Data, loss, optimizer, loop and files stay Laras'; for the trainer see
`laras.training.upstream`.

Source: Unsloth 2026.10.9, `models/llama.py` (`LlamaModel_fast_forward`, `get_peft_model`, `patch_peft_model`).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from laras.config import RunConfig
from laras.errors import ConfigError, RunStateError
from laras.planning.backend import choose_backend, is_installed, layers_of
from laras.planning.hardware import local_capability
from laras.progress import Observer
from laras.records import ModelSpec, PlanChoices

if TYPE_CHECKING:
    from torch import Tensor

_AFTER_UNSLOTH = ("torch", "transformers", "trl", "peft")
_TRIAL_TIMEOUT_S = 300
_TRIAL = """
import unsloth, torch
if not torch.cuda.is_available():
    raise SystemExit("torch finds no CUDA device")
if torch.cuda.get_device_capability() < (7, 0):
    raise SystemExit("the first GPU has compute capability below 7.0")
"""


_past_failure: list[str] = []  # of this process, in which the libraries have come first since


def is_imported() -> bool:
    """Whether this process has Unsloth, and with it changed libraries."""
    return "unsloth" in sys.modules


def import_for_config(config: RunConfig, load_spec: Callable[[], ModelSpec], observer: Observer) -> str | None:
    """Imports Unsloth where the configuration takes it.

    Args:
        config: Of the run that is to start.
        load_spec: Gives the architecture, without torch.
        observer: Is told what is imported.

    Returns:
        Why it was to be taken and could not be imported; None when it is there or was not to be taken.
    """
    if config.backend == "transformers" or not is_installed():
        return None
    spec = load_spec()
    if choose_backend(config, spec, local_capability(), layers_of(spec.fused_refusal is None)).name != "unsloth":
        return None
    observer.stage_started("importing Unsloth")
    return import_first(with_trial=True)


def import_for_run(run_dir: Path, choices: PlanChoices, observer: Observer) -> None:
    """Imports Unsloth where the run was started with it; another backend would compute other numbers.

    Raises:
        RunStateError: It cannot be had here.
    """
    if choices.backend != "unsloth":
        return
    observer.stage_started("importing Unsloth")
    failure = import_first(with_trial=False) if is_installed() else "it is not installed"
    if failure is not None:
        raise RunStateError(
            f"{run_dir} was started with Unsloth, and {failure}",
            hint=f"pip install 'laras[unsloth]'; or go on in a new run: `laras train --from {run_dir} backend=auto`",
        )


def import_first(*, with_trial: bool) -> str | None:
    """Imports Unsloth before the libraries that it changes.

    Args:
        with_trial: Try it in a process of its own first: an import that fails half-way leaves libraries changed, so
            that nothing else could be trained here any more. It takes as long as the import itself.

    Returns:
        Why it cannot be had in this process, in one line; None when it is there.
    """
    if is_imported():
        return None
    if _past_failure:
        return _past_failure[0]
    early = [name for name in _AFTER_UNSLOTH if name in sys.modules]
    if early:
        return (
            f"{', '.join(early)} had been imported before it in this process (start a new one: `laras train`, or "
            "`laras.train` as the first call in Python)"
        )
    _set_environment()
    if with_trial and (failure := _failure_of_trial()) is not None:
        _past_failure.append(failure)
        return failure
    try:
        with redirect_stdout(sys.stderr):  # it greets there, and standard output is for data
            import_module("unsloth")
    except Exception as error:  # noqa: BLE001 - whatever another library raises as it is imported
        return f"its import fails: {_last_line(f'{type(error).__name__}: {error}')}"
    return None


def _set_environment() -> None:
    """No call home, and its generated code in the user's cache instead of the folder that one stands in."""
    cache = Path(platformdirs.user_cache_dir("laras", appauthor=False)) / "unsloth"
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))


def _failure_of_trial() -> str | None:
    command = [sys.executable, "-P", "-c", _TRIAL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its import takes longer than {_TRIAL_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    return f"its import fails: {_last_line(done.stderr) or f'exit status {done.returncode}'}"


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


@contextmanager
def off_standard_output(choices: PlanChoices) -> Iterator[None]:
    """Sends what Unsloth prints while it computes to standard error; standard output is for data."""
    with redirect_stdout(sys.stderr) if choices.backend == "unsloth" else nullcontext():
        yield


def build_layers(config: RunConfig, choices: PlanChoices) -> Any:
    """The base with adapters, on the first GPU; the adapters begin as on every other path.

    Args:
        config: Names the model and the seed of the adapters.
        choices: The plan, with `backend: unsloth`.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ConfigError: The model cannot be loaded, or its loss cannot be computed in parts.
    """
    import torch

    from laras.models.builtin import resolve_model
    from laras.models.heads import plain_head
    from laras.models.precision import torch_dtype

    unsloth: Any = import_module("unsloth")
    place = str(Path(resolve_model(config.model_name_or_path)).expanduser())
    kept = "unsloth" if choices.gradient_checkpointing else False  # its own kind, which moves inputs to main memory
    common = {"max_seq_length": choices.max_length, "use_gradient_checkpointing": kept}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model, _ = unsloth.FastLanguageModel.from_pretrained(
                model_name=place,
                dtype=torch_dtype(choices.precision),
                load_in_4bit=choices.load_in_4bit,
                revision=config.model_revision,
                local_files_only=Path(place).is_dir(),
                use_exact_model_name=True,  # not another repository with weights that it has quantised
                use_safetensors=True,
                offload_embedding=False,  # what lies where is the plan's
                **common,
            )
            model = unsloth.FastLanguageModel.get_peft_model(
                model,
                r=choices.lora_r,
                lora_alpha=choices.lora_alpha,
                lora_dropout=choices.lora_dropout,
                target_modules=list(choices.target_modules),
                bias="none",
                use_rslora=choices.use_rslora,
                random_state=config.seed,
                **common,
            )
            unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=kept)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(
            f"Unsloth cannot load model_name_or_path {config.model_name_or_path!r}: "
            f"{_last_line(f'{type(error).__name__}: {error}')}",
            hint="set `backend: auto`, which takes Laras' own layers",
        ) from error
    set_initial_adapters(model, config.seed)
    for adapter in model.peft_config.values():  # as peft itself writes it, so that everybody can load it
        adapter.base_model_name_or_path, adapter.auto_mapping = place, None
    if plain_head(model) is None:
        raise ConfigError(
            f"Unsloth has replaced the output head of {config.model_name_or_path!r}, and Laras' loss needs a plain one",
            hint="set `backend: auto`",
        )
    return model


def set_initial_adapters(model: Any, seed: int) -> None:
    """Gives adapters the values that `laras.models.lora.attach_lora` gives them, in float32; the random state stays.

    Random numbers are drawn as peft draws them, layer by layer: two of `torch.nn.Linear`, which peft then sets anew,
    and one for A.

    Source: peft 0.21 `LoraLayer.update_layer` and `reset_lora_parameters`.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            for name, adapter in module.lora_A.items():
                first = nn.Linear(adapter.in_features, adapter.out_features, bias=False)
                nn.Linear(adapter.out_features, module.lora_B[name].out_features, bias=False)
                nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
                adapter.weight.data = first.weight.detach().to(adapter.weight.device)
                module.lora_B[name].weight.data = torch.zeros_like(module.lora_B[name].weight, dtype=torch.float32)


def hidden_states(causal: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Output of the decoder (B, T, D); the step runs it under autocast, as Unsloth's trainer would.

    Args:
        causal: The model without its adapter wrapper.
        inputs: `input_ids` with `attention_mask`, or with `position_ids` and `cu_seqlens`.
    """
    own = {name: value for name, value in inputs.items() if name != "cu_seqlens"}
    if "cu_seqlens" in inputs:
        lengths = inputs["cu_seqlens"].diff()
        own["packed_seq_lengths"] = lengths[lengths > 0]  # the last bound is repeated, for a fixed shape
    output = causal.base_model(**own, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden.to(causal.get_output_embeddings().weight.dtype)
