"""A finished run's model: the base and the tuned one, as `laras test`, `chat` and `export` need them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laras.config import RunConfig
from laras.errors import CheckpointError, RunStateError
from laras.models.loader import load_model
from laras.models.unsloth import is_imported
from laras.records import PlanChoices, Precision
from laras.whole_folder import require_whole


@dataclass(frozen=True)
class FinishedModels:
    """The two models of a finished run. LoRA holds the weights once: its base is the tuned model less the adapter.

    Attributes:
        tokenizer: As saved with the tuned model.
    """

    tokenizer: PreTrainedTokenizerBase
    _tuned: nn.Module
    _base: nn.Module | None  # None: the tuned model with its adapter switched off

    @contextmanager
    def tuned(self) -> Iterator[nn.Module]:
        """The tuned model."""
        yield self._tuned

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The base model; the tuned one is not usable meanwhile."""
        if self._base is not None:
            yield self._base
            return
        if not isinstance(self._tuned, PeftModel):
            raise TypeError("a model without adapter has no base in it")
        with self._tuned.disable_adapter():
            yield self._tuned


def require_final(final_dir: Path) -> None:
    """Refuses a finished run's `final/` that is not as training left it.

    Raises:
        CheckpointError: When it is missing or damaged.
    """
    again = f"`laras resume {final_dir.parent} --checkpoint N` with its last step writes it anew"
    if not final_dir.is_dir():
        raise CheckpointError(f"{final_dir} is missing", hint=f"finish the run with `laras resume`; else {again}")
    require_whole(final_dir, again)


def load_finished(config: RunConfig, choices: PlanChoices, final_dir: Path, device: torch.device) -> FinishedModels:
    """Loads base and tuned model in the formats that training used, in evaluation mode.

    Args:
        config: The run's configuration.
        choices: The run's plan.
        final_dir: The run's `final/`.
        device: Where to put them; on a CPU a run in fp16 is computed in fp32.

    Raises:
        CheckpointError: When `final/` is missing, damaged, or of another model.
        RunStateError: When this process has Unsloth.
        ConfigError: When the base cannot be loaded.
    """
    require_final(final_dir)
    if is_imported():
        raise RunStateError(
            "Unsloth has changed transformers in this process, and a score or an answer is that of unchanged layers",
            hint=f"run it in a process of its own: `laras test {final_dir.parent}`",
        )
    tokenizer = AutoTokenizer.from_pretrained(final_dir)
    base = _load_base(config, choices, device)
    if choices.finetuning_type == "full":
        tuned: nn.Module = load_model(str(final_dir), precision=_precision(choices, device), device=str(device))
        base.train(False)
        return FinishedModels(tokenizer, tuned.eval(), base)
    try:
        tuned = PeftModel.from_pretrained(base, str(final_dir), torch_device=str(device))
    except (RuntimeError, ValueError) as error:  # sizes, or names of layers
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"the adapter in {final_dir} is not one for {config.model_name_or_path}: {str(error).splitlines()[0]}",
            hint="restore the run's config.yaml, and the model that it names as it was in training",
        ) from None
    return FinishedModels(tokenizer, tuned.eval(), None)


def _load_base(config: RunConfig, choices: PlanChoices, device: torch.device) -> PreTrainedModel:
    return load_model(
        config.model_name_or_path,
        precision=_precision(choices, device),
        device=str(device),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        # Other kernels compute the same; eager alone knows terms such as capped scores.
        attention="eager" if choices.attention == "eager" else None,
        load_in_4bit=choices.load_in_4bit,
        load_in_8bit=choices.load_in_8bit,
    )


def _precision(choices: PlanChoices, device: torch.device) -> Precision:
    return "fp32" if device.type == "cpu" and choices.precision == "fp16" else choices.precision
