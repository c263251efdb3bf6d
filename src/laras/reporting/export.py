"""A finished run's model in a form that other tools load: verified, with a model card, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laras.config import BUILTIN_MODEL
from laras.data.store import read_tokens
from laras.errors import CheckpointError, ConfigError, LarasError, RunStateError
from laras.models.builtin import HUB_ID
from laras.models.finished import require_final
from laras.models.loader import load_model, load_model_config
from laras.progress import Observer
from laras.records import Precision
from laras.reporting.gguf_file import (
    Quantization,
    is_described_whole,
    require_family,
    round_as_stored,
    write_gguf,
)
from laras.reporting.gguf_reading import READ_HERE, read_gguf
from laras.reporting.model_card import model_card
from laras.reporting.run_data import RunData, load_run_data
from laras.whole_folder import MANIFEST_NAME, WRITE_ERRORS

Format = Literal["adapter", "merged", "gguf", "ollama"]
GGUF_NAME = "model.gguf"
ADAPTER_MODEL, ROUNDED_MODEL = "the adapter model", "the model with its weights rounded as stored"
# Greatest difference allowed between the logits of two forms of one model, as a share of the greatest logit: rounding
# of the stored weights (8, 11 and 24 bits of mantissa) and of the arithmetic.
_TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PROBE_ROWS, _PROBE_TOKENS = 4, 64
_OLLAMA_CONTEXT = 4096  # tokens that are kept of a conversation, where the model can take so many
_PROBE_TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2."
# Files of `final/` that belong to the run and not to the model.
_NOT_EXPORTED = (MANIFEST_NAME, "training_args.bin", "README.md")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The folder.
        format: As asked.
        max_logit_difference: Greatest difference of a logit; None for a plain copy.
        tolerance: What it was allowed to be.
        url: Where it was pushed to.
        compared_with: Whose logits they are compared with.
        rounding_logit_difference: How far a logit is from the adapter model's because GGUF stores rounded weights; None
            for other formats.
    """

    path: Path
    format: Format
    max_logit_difference: float | None
    tolerance: float | None
    url: str | None = None
    compared_with: str = ADAPTER_MODEL
    rounding_logit_difference: float | None = None


@dataclass(frozen=True)
class _Check:
    """How far the logits of a result are from those of a reference."""

    difference: float | None = None
    tolerance: float | None = None
    reference: str = ADAPTER_MODEL
    rounding: float | None = None


def export_run(
    run_dir: Path | str,
    format: Format,
    *,
    output: Path | None = None,
    quantization: Quantization = "f16",
    push: str | None = None,
    observer: Observer | None = None,
) -> Export:
    """Exports the tuned model of a finished run.

    Args:
        run_dir: The run.
        format: `adapter`: as trained, the base named by its public id; `merged`: whole weights; `gguf`: one file for
            llama.cpp; `ollama`: that and a Modelfile.
        output: The folder to make; `RUN/export/FORMAT` by default.
        quantization: Of GGUF.
        push: A Hub repository to upload to; nothing is sent without it.
        observer: Is told what happens.

    Raises:
        RunStateError: The run has not finished, or the folder exists or cannot be written.
        CheckpointError: The result does not compute what the adapter computes; nothing is left behind.
        ConfigError: The model has no adapter, its family is not written as GGUF, or `push` is no name of a repository
            or nobody is logged in.
    """
    observer = observer or Observer()
    run = load_run_data(Path(run_dir))
    _require_finished(run)
    if push is not None:
        _require_pushable(push)
    target = output or run.path / "export" / (format if format in ("adapter", "merged") else f"{format}-{quantization}")
    if target.exists():
        raise RunStateError(f"{target} exists already", hint="name another folder with --output, or remove it")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        check = _write(run, format, aside, quantization, observer)
        card = aside / "README.md"
        card.write_text(model_card(run, format, base_id(run), quantization), encoding="utf-8")
        for path in aside.iterdir():  # safetensors lets nobody else read what it writes
            path.chmod(card.stat().st_mode)
        aside.rename(target)
    except WRITE_ERRORS as error:
        raise RunStateError(
            f"{target} cannot be written: {getattr(error, 'strerror', None) or error}",
            hint="make room, or name a folder of another disk with --output",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    url = _push(target, push, observer) if push is not None else None
    return Export(target, format, check.difference, check.tolerance, url, check.reference, check.rounding)


def base_id(run: RunData) -> str:
    """The name under which others find the base: the Hub id of the built-in model, else as the user wrote it."""
    assert run.config is not None  # `_require_finished` has seen to it
    source = run.config.model_name_or_path
    return HUB_ID if source == BUILTIN_MODEL else source


def _require_finished(run: RunData) -> None:
    if run.config is None or run.plan is None or run.result is None or run.status != "finished":
        raise RunStateError(
            f"{run.path} has not finished (status: {run.status}); there is nothing to export",
            hint=f"finish it with `laras resume {run.path}`",
        )
    require_final(run.path / "final")


def _write(run: RunData, format: Format, folder: Path, quantization: Quantization, observer: Observer) -> _Check:
    assert run.plan is not None
    final, full = run.path / "final", run.plan.choices.finetuning_type == "full"
    if format == "adapter":
        if full:
            raise ConfigError("full fine-tuning has no adapter to export", hint="use --format merged")
        _copy_adapter(run, final, folder)
        return _Check()
    if format == "merged" and full:
        _copy_files(final, folder)
        return _Check()
    observer.stage_started("loading the model in its own precision")
    model, reference_TV = (_load_full(final), None) if full else _merge(run, final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    probe = _probe(run, tokenizer)
    expected_TV = reference_TV if reference_TV is not None else _logits(model, probe)
    if format == "merged":
        observer.stage_started("writing the merged weights")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        observer.stage_started("checking the result")
        precision = _PRECISIONS[model.dtype]
        del model
        return _verify(load_model(str(folder), precision=precision), probe, expected_TV, precision)
    require_family(model.config)
    if reference_TV is not None:
        _compare(_logits(model, probe), reference_TV, _PRECISIONS[model.dtype])
    observer.stage_started("writing the GGUF file")
    write_gguf(model, tokenizer, folder / GGUF_NAME, quantization, run.name)
    config: Any = model.config
    if format == "ollama":
        text = modelfile(tokenizer, run.plan.choices.max_length, config.max_position_embeddings)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    observer.stage_started("checking the result")
    model.float()  # type: ignore[no-untyped-call]
    round_as_stored(model, quantization)
    rounded_TV = _logits(model, probe)
    del model  # before the file is read into another one
    check = _verify(_load_gguf(folder, config), probe, rounded_TV, "fp32", ROUNDED_MODEL)
    return replace(check, rounding=float((rounded_TV - expected_TV).abs().max()))


def _copy_files(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _NOT_EXPORTED:
            shutil.copyfile(path, folder / path.name)


def _copy_adapter(run: RunData, final: Path, folder: Path) -> None:
    """The adapter as trained, its base named as others can load it instead of by a path of this machine's cache."""
    _copy_files(final, folder)
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    assert run.config is not None
    config["base_model_name_or_path"], config["revision"] = base_id(run), run.config.model_revision
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_full(final: Path) -> PreTrainedModel:
    precision = _own_precision(load_model_config(str(final)))
    return load_model(str(final), precision=precision).eval()  # type: ignore[no-untyped-call,no-any-return]


def _merge(run: RunData, final: Path) -> tuple[PreTrainedModel, torch.Tensor]:
    """The unquantised base with the adapter added to its weights, and what the adapter model computed before."""
    assert run.config is not None
    source, revision, trusted = run.config.model_name_or_path, run.config.model_revision, run.config.trust_remote_code
    precision = _own_precision(load_model_config(source, revision=revision, trust_remote_code=trusted))
    base = load_model(source, precision=precision, revision=revision, trust_remote_code=trusted)
    try:
        adapted: Any = PeftModel.from_pretrained(base, str(final)).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{final} holds no usable adapter: {error}", hint="restore the folder") from None
    logits_TV = _logits(adapted, _probe(run, AutoTokenizer.from_pretrained(final)))
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged.eval(), logits_TV


def _own_precision(config: Any) -> Precision:
    """The format in which a model's weights are stored."""
    return _PRECISIONS.get(config.dtype, "fp32")


def _probe(run: RunData, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Some validation rows, cut short; they are what the model is for. A sentence where they are gone."""
    try:
        rows = read_tokens(run.path / "splits" / "validation.parquet")
    except RunStateError:
        rows = None
    if rows is None or rows.num_rows == 0:
        return [list(tokenizer(_PROBE_TEXT)["input_ids"])]
    return [ids[:_PROBE_TOKENS] for ids in rows.slice(0, _PROBE_ROWS)["input_ids"].to_pylist()]


def _logits(model: Any, probe: list[list[int]]) -> torch.Tensor:
    """Logits of all probes one after the other, shape (tokens, V), in float32."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].float() for ids in probe])


def _verify(
    model: Any,
    probe: list[list[int]],
    expected_TV: torch.Tensor,
    precision: Precision,
    reference: str = ADAPTER_MODEL,
) -> _Check:
    return _compare(_logits(model.eval(), probe), expected_TV, precision, reference)


def _compare(
    found_TV: torch.Tensor, expected_TV: torch.Tensor, precision: Precision, reference: str = ADAPTER_MODEL
) -> _Check:
    tolerance = _TOLERANCES[precision] * max(1.0, float(expected_TV.abs().max()))
    difference = float((found_TV - expected_TV).abs().max()) if found_TV.shape == expected_TV.shape else float("inf")
    if not difference <= tolerance:
        raise CheckpointError(
            f"the exported model differs from {reference} by {difference:.4g} in a logit; at most {tolerance:.4g} is "
            "rounding",
            hint="nothing was left behind; please report this with the model's name",
        )
    return _Check(difference, tolerance, reference)


def _load_gguf(folder: Path, model_config: Any) -> PreTrainedModel:
    """The file as transformers reads it; what its reader does not look for in the file is given to it.

    A family that transformers' reader does not know is read here, from nothing but the file.
    """
    if model_config.model_type in READ_HERE:
        return read_gguf(folder / GGUF_NAME)
    given = {} if is_described_whole(model_config) else {"config": model_config}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_NAME, dtype=torch.float32, **given
    )
    return loaded


def modelfile(tokenizer: PreTrainedTokenizerBase, trained_tokens: int, context_tokens: int) -> str:
    """The Modelfile of Ollama: ChatML as a template of its own, others as Ollama recognises them in the GGUF file.

    Args:
        tokenizer: With the chat template.
        trained_tokens: Longest example of the training.
        context_tokens: What the model can take.
    """
    lines = [f"FROM ./{GGUF_NAME}", f"PARAMETER num_ctx {min(context_tokens, max(_OLLAMA_CONTEXT, trained_tokens))}"]
    if _is_chatml(tokenizer):
        lines += [
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}',
            "{{ .Content }}<|im_end|>",
            "{{ end }}<|im_start|>assistant",
            '"""',
            'PARAMETER stop "<|im_end|>"',
        ]
        if (system := _default_system(tokenizer)) and '"""' not in system:
            lines.append(f'SYSTEM """{system}"""')
    elif tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(str(tokenizer.eos_token))}")
    return "\n".join(lines) + "\n"


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a conversation just as the template above does."""
    turns = [{"role": role, "content": f"some {role} words"} for role in ("system", "user", "assistant", "user")]
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return _rendered(tokenizer, turns) == expected + "<|im_start|>assistant\n"


def _default_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a ChatML template says as the system when nobody does; the model was tuned behind these words."""
    text = _rendered(tokenizer, [{"role": "user", "content": "some words"}]) or ""
    before = text.partition("<|im_start|>user\n")[0]
    return before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n") or None


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception:  # noqa: BLE001 - a template is a program of somebody else; it may refuse this conversation
        return None


def _require_pushable(repository: str) -> None:
    """Refuses what cannot be pushed before minutes of work, not after them."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository!r:.100}: {error}", hint="a repository is named OWNER/NAME") from None
    if get_token() is None:
        raise ConfigError(
            f"nobody is logged in to the Hub, so nothing can be pushed to {repository}",
            hint="log in with `hf auth login`",
        )


def _push(folder: Path, repository: str, observer: Observer) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    observer.stage_started(f"uploading to {repository}")
    upload: Callable[[], Any] = lambda: HfApi().upload_folder(repo_id=repository, folder_path=folder)  # noqa: E731
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(upload())
    except (HfHubHTTPError, OSError) as error:
        raise LarasError(
            f"{folder} is complete, but cannot be pushed to {repository}: {str(error).splitlines()[0]}",
            hint="check the name and your rights, and push that folder with `hf upload`",
        ) from None
