"""The README of an export: what it is, how good, of which data, under which licence, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from laras import __version__
from laras.formatting import interval, number, percent, plain
from laras.models.builtin import HUB_ID
from laras.reporting.run_data import RunData

_LICENSES = {HUB_ID: "apache-2.0"}
_LOADING = {
    "adapter": """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```""",
    "merged": """\
```python
from transformers import pipeline

generate = pipeline("text-generation", model="FOLDER")
print(generate([{"role": "user", "content": "Hello"}], max_new_tokens=100))
```""",
    "gguf": "```sh\nllama-cli -m FOLDER/model.gguf\n```",
    "ollama": "```sh\nollama create NAME -f FOLDER/Modelfile\nollama run NAME\n```",
}


def model_card(run: RunData, format: str, base_id: str, quantization: str) -> str:
    """Markdown with YAML metadata, as the Hub reads it."""
    license_id = base_license(base_id)
    is_path = Path(base_id).exists() or base_id.startswith((".", "/", "~"))
    metadata: dict[str, Any] = {
        **({} if is_path else {"base_model": base_id}),
        **({"license": license_id} if license_id else {}),
        "library_name": {"adapter": "peft", "merged": "transformers"}.get(format, "gguf"),
        "pipeline_tag": "text-generation",
        "tags": [
            "laras",
            *(["lora"] if format == "adapter" else []),
            *(["gguf"] if format in ("gguf", "ollama") else []),
        ],
    }
    base_name = Path(base_id).name if is_path else base_id
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {run.name}\n",
        f"{base_name}, fine-tuned with laras {__version__}; exported as {_form(format, quantization)}.\n",
        _score_section(run),
        _data_section(run),
        _settings_section(run),
        f"## Licence\n\n{_license_line(license_id)}\n",
        f"## Load it\n\n{_LOADING[format]}\n",
    ]
    return "\n".join(parts)


def base_license(base_id: str) -> str | None:
    """The base's licence, from what is on this machine: its folder, or the Hub's cache; None when unknown."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    card: Any = Path(base_id).expanduser() / "README.md"
    if not card.is_file():
        try:
            card = try_to_load_from_cache(base_id, "README.md")
        except HFValidationError:  # a path, not an id
            card = None
    try:
        metadata = metadata_load(card) if isinstance(card, str | Path) else None
    except (OSError, ValueError, yaml.YAMLError):
        metadata = None
    license_id = (metadata or {}).get("license")
    return str(license_id) if license_id else _LICENSES.get(base_id)


def _form(format: str, quantization: str) -> str:
    return {"adapter": "a LoRA adapter", "merged": "whole weights"}.get(format, f"GGUF, {quantization}")


def _license_line(license_id: str | None) -> str:
    if license_id is None:
        return "The licence of the base is not known here; look it up before you share this model."
    return f"That of the base: {license_id}."


def _score_section(run: RunData) -> str:
    lines = ["## Score on the sealed test set\n"]
    if run.evaluation is None:
        return lines[0] + "\nNot scored.\n"
    lines += [
        "| | loss (95% interval) | perplexity (95% interval) | token accuracy |",
        "|---|---|---|---|",
    ]
    for name, score in (("base", run.evaluation.base), ("tuned", run.evaluation.tuned)):
        lines.append(
            f"| {name} | {number(score.loss, 4)} ({interval(score.loss_ci95, 4)}) | {number(score.perplexity, 3)} "
            f"({interval(score.perplexity_ci95, 3)}) | {percent(score.token_accuracy, 2)} |"
        )
    times = "once" if len(run.openings) == 1 else f"{len(run.openings)} times"
    lines.append(
        f"\n{run.evaluation.tuned.examples:,} examples, {run.evaluation.tuned.target_tokens:,} target tokens; the test "
        f"set was kept from training and opened {times}. Improvement in loss, base minus "
        f"tuned: {interval(run.evaluation.loss_improvement_ci95, 4)} (95%). Measured before merging and before any "
        "rounding of the weights.\n"
    )
    return "\n".join(lines)


def _data_section(run: RunData) -> str:
    if run.split is None or run.profile is None:
        return "## Data\n\nNot recorded.\n"
    rows = ", ".join(
        f"{name} {info.rows:,} rows (SHA-256 `{info.sha256}`)"
        for name, info in (("train", run.split.train), ("validation", run.split.validation), ("test", run.split.test))
    )
    return f"## Data\n\nFormat {run.profile.format}; digests are of the tokens: {rows}.\n"


def _settings_section(run: RunData) -> str:
    if run.plan is None or run.config is None or run.result is None:
        return "## Settings\n\nNot recorded.\n"
    choices, config = run.plan.choices, run.config
    settings: dict[str, Any] = {
        "method": choices.finetuning_type, "rank": choices.lora_r, "alpha": choices.lora_alpha,
        "rsLoRA": choices.use_rslora, "DoRA": choices.use_dora, "layers": ", ".join(choices.target_modules),
        "4-bit": choices.load_in_4bit, "precision": choices.precision, "learning rate": choices.learning_rate,
        "schedule": config.lr_scheduler_type, "effective batch": config.effective_batch_size,
        "longest example": f"{choices.max_length} tokens", "steps": run.result.steps, "seed": config.seed,
    }  # fmt: skip
    return "## Settings\n\n" + "\n".join(f"- {name}: {plain(value)}" for name, value in settings.items()) + "\n"
