"""Training runs of a second or two on CPU: a tiny Llama, a few dozen random rows, and every way a run can be set up."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from laras.config import RunConfig
from laras.models.attention import VARLEN, register_attention
from laras.models.step import TrainStep, eager_step
from laras.progress import Observer, StepReport, ValidationReport
from laras.records import HardwareSpec, MemoryEstimate, ModelSpec, PlanChoices, RunResult, TimeEstimate, TrainPlan
from laras.training.resume import choose_checkpoint
from laras.training.run import run_training

VOCABULARY = 64
torch.set_num_threads(1)  # more make tiny matrices slower
# A run collects garbage when it begins; without what the imports left, that takes milliseconds instead of a second.
gc.collect()
gc.freeze()


def tokenizer() -> Fast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return Fast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def base_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(base_config()).save_pretrained(folder)
    return folder


def model(method: str = "lora", dropout: float = 0.0, packing: bool = False, base: Path | None = None) -> Any:
    """`full`, `lora`, `rslora`, `dora`, or `qlora`, which needs the folder of a base."""
    torch.manual_seed(0)
    if method == "qlora":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        whole = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, device_map={"": "cpu"})
    else:
        whole = LlamaForCausalLM(base_config())
    if packing:
        register_attention()
        whole.set_attn_implementation(VARLEN)
    if method == "full":
        return whole
    torch.manual_seed(1)
    adapter = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM",
        use_rslora=method == "rslora", use_dora=method == "dora",
    )  # fmt: skip
    return get_peft_model(whole, adapter)


def rows(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, VOCABULARY, (5 + i % 7,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def plan(micro: int, accumulation: int, source: str = "tiny", **changed: Any) -> TrainPlan:
    settings = {
        "per_device_train_batch_size": micro, "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": accumulation, "gradient_checkpointing": False, "packing": False,
        "max_length": 16, "finetuning_type": "lora", "load_in_4bit": False, "load_in_8bit": False,
        "precision": "fp32", "optim": "adamw_torch", "backend": "transformers", "attention": "sdpa",
        "loss_kind": "full", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": False, "target_modules": ("q_proj",), "trainable_parameters": 1, "total_parameters": 1,
        "learning_rate": 1e-2, "eval_steps": 3, "save_steps": 3, "logging_steps": 1,
    }  # fmt: skip
    return TrainPlan(
        config_digest="0",
        model=ModelSpec(
            source=source, model_type="llama", architecture="LlamaForCausalLM", layers=2, hidden_size=16,
            intermediate_size=32, attention_heads=2, key_value_heads=2, head_dim=8, vocab_size=VOCABULARY,
            max_position_embeddings=128, tie_word_embeddings=False, total_parameters=1, linear_parameters=1,
            embedding_parameters=1, config_digest="0",
        ),
        hardware=HardwareSpec(
            kind="cpu", gpu_name="cpu", count=1, total_bytes=1, other_processes_bytes=0, compute_capability=None,
            native_bf16=False, bandwidth_bytes_per_s=1.0, peak_flops={}, source="local",
        ),
        choices=PlanChoices.model_validate(settings | changed),
        reasons={},
        memory=MemoryEstimate(
            train_peak_allocated_bytes=10**9, train_peak_reserved_bytes=10**9, eval_peak_allocated_bytes=1,
            device_budget_bytes=1, components={}, peak_moment="", method="closed-form",
        ),
        time=TimeEstimate(tokens_per_s=1.0, steps=1, total_s=1.0),
        total_steps=1,
        fits=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One way to set up a run."""

    micro: int = 4
    accumulation: int = 2
    method: str = "lora"
    dropout: float = 0.0
    choices: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 24

    def run_config(self, source: str = "tiny") -> RunConfig:
        defaults = {
            "model_name_or_path": source, "num_train_epochs": 2, "effective_batch_size": 8,
            "early_stopping_patience": None, "report_to": [],
        }  # fmt: skip
        return RunConfig.model_validate(defaults | self.config)

    def train_plan(self, source: str = "tiny") -> TrainPlan:
        return plan(self.micro, self.accumulation, source, **self.choices)


SCENARIOS = {
    "padded": Scenario(dropout=0.1),
    "packed": Scenario(2, 2, dropout=0.1, choices={"packing": True, "save_steps": 2}, train_rows=40),
    "early_stopping": Scenario(
        8, 1, config={"num_train_epochs": 20, "early_stopping_patience": 2, "early_stopping_min_delta": 10.0},
        choices={"save_steps": 4, "logging_steps": 2},
    ),
    "accumulation": Scenario(
        2, 4, dropout=0.1, config={"num_train_epochs": 3}, choices={"save_steps": 2, "eval_steps": 4}
    ),
    "dora": Scenario(method="dora"),
    "rslora": Scenario(method="rslora"),
    "full": Scenario(method="full", choices={"finetuning_type": "full", "learning_rate": 1e-3}),
    "qlora": Scenario(method="qlora", dropout=0.1, choices={"load_in_4bit": True}),
}  # fmt: skip


@dataclass
class StepOf:
    """A training step made of a function."""

    call: Callable[[Any, Tensor], Tensor]
    release: Callable[[], None] = lambda: None
    rehearsals: int = 1

    def __call__(self, batch: Any, scale: Tensor) -> Tensor:
        return self.call(batch, scale)


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[StepReport] = []
        self.validations: list[ValidationReport] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def step_finished(self, report: StepReport) -> None:
        self.steps.append(report)

    def validated(self, report: ValidationReport) -> None:
        self.validations.append(report)


def train(
    run_dir: Path,
    scenario: Scenario,
    *,
    resume: int | bool = False,
    observer: Observer | None = None,
    make_step: Callable[[nn.Module], TrainStep] = eager_step,
    **options: Any,
) -> tuple[RunResult, Any]:
    """One session; `resume` names a step, or True goes on from the newest good checkpoint."""
    observer = observer or Observer()
    checkpoint = None
    if resume:
        checkpoint = choose_checkpoint(run_dir, None if resume is True else resume, observer)
    base = run_dir.parent / "base"
    if scenario.method == "qlora" and not base.exists():
        save_base(base)
    packing = bool(scenario.choices.get("packing"))
    trained = options.pop("model", None) or model(scenario.method, scenario.dropout, packing, base)
    settings = {
        "train_rows": rows(scenario.train_rows, 1),
        "validation_rows": rows(6, 2),
        "tokenizer": tokenizer(),
        "config": scenario.run_config(),
        "plan": scenario.train_plan(),
    } | options
    config, the_plan = settings.pop("config"), settings.pop("plan")
    result = run_training(
        config, the_plan, trained, run_dir=run_dir, observer=observer, resume_from=checkpoint, make_step=make_step,
        **settings,
    )  # fmt: skip
    return result, trained


def parameters(trained: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the metrics file without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    measured = ("time_s", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in measured and not k.startswith("memory/")} for line in lines]


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that two runs must share, byte for byte, to be the same run."""
    result = RunResult.load(run_dir)
    newest = max((run_dir / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))
    state = json.loads((newest / "training.json").read_text())
    state["counters"].pop("events")
    weights = "model.safetensors" if (newest / "model.safetensors").exists() else "adapter_model.safetensors"
    files = {
        name: path.read_bytes()
        for name, path in {
            "final": run_dir / "final" / weights,
            "best": run_dir / "best" / weights,
            "last": newest / weights,
            "optimizer": newest / "optimizer.safetensors",
        }.items()
        if path.exists()
    }
    return {
        "files": files,
        "state": state,
        "metrics": metrics(run_dir),
        "steps": result.steps,
        "best": result.best,
        "stopped_early": result.stopped_early,
        "status": result.status,
        "newest": newest.name,
    }
