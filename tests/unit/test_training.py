"""Training on CPU with a tiny model: the gradient does not depend on how a batch is divided, and a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laras.config import RunConfig
from laras.progress import Observer
from laras.records import HardwareSpec, MemoryEstimate, ModelSpec, PlanChoices, RunResult, TimeEstimate, TrainPlan
from laras.training.checkpoints import verify_checkpoint
from laras.training.run import run_training

VOCABULARY = 64


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapter)


def rows(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, VOCABULARY, (5 + i % 7,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def plan(micro: int, accumulation: int, checkpointing: bool = False) -> TrainPlan:
    return TrainPlan(
        config_digest="0",
        model=ModelSpec(
            source="tiny", model_type="llama", architecture="LlamaForCausalLM", layers=2, hidden_size=16,
            intermediate_size=32, attention_heads=2, key_value_heads=2, head_dim=8, vocab_size=VOCABULARY,
            max_position_embeddings=128, tie_word_embeddings=False, total_parameters=1, linear_parameters=1,
            embedding_parameters=1, config_digest="0",
        ),
        hardware=HardwareSpec(
            kind="cpu", gpu_name="cpu", count=1, total_bytes=1, other_processes_bytes=0, compute_capability=None,
            native_bf16=False, bandwidth_bytes_per_s=1.0, peak_flops={}, source="local",
        ),
        choices=PlanChoices(
            per_device_train_batch_size=micro, per_device_eval_batch_size=4, gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing, packing=False, max_length=128, finetuning_type="lora",
            load_in_4bit=False, load_in_8bit=False, precision="fp32", optim="adamw_torch", backend="transformers",
            attention="sdpa", loss_kind="full", lora_r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=False,
            use_dora=False, target_modules=("q_proj",), trainable_parameters=1, total_parameters=1,
            learning_rate=1e-2, eval_steps=3, save_steps=3, logging_steps=1,
        ),
        reasons={},
        memory=MemoryEstimate(
            train_peak_allocated_bytes=1, train_peak_reserved_bytes=1, eval_peak_allocated_bytes=1,
            device_budget_bytes=1, components={}, peak_moment="", method="closed-form",
        ),
        time=TimeEstimate(tokens_per_s=1.0, steps=1, total_s=1.0),
        total_steps=1,
        fits=True,
    )  # fmt: skip


def train(run_dir: Path, the_plan: TrainPlan, dropout: bool = False, **config: Any) -> tuple[RunResult, Any]:
    resume_from = config.pop("resume_from", None)
    model = tiny_model()
    if not dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    settings = {"num_train_epochs": 2, "effective_batch_size": 8, "early_stopping_patience": None} | config
    result = run_training(
        RunConfig.model_validate(settings), the_plan, model, tiny_tokenizer(), train_rows=rows(24, 1),
        validation_rows=rows(6, 2), run_dir=run_dir, observer=Observer(), resume_from=resume_from,
    )  # fmt: skip
    return result, {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(("micro", "accumulation", "checkpointing"), [(4, 2, False), (2, 4, True), (1, 8, False)])
def test_the_result_does_not_depend_on_how_the_batch_is_divided(
    tmp_path: Path, micro: int, accumulation: int, checkpointing: bool
) -> None:
    _, whole = train(tmp_path / "whole", plan(8, 1))
    _, divided = train(tmp_path / "divided", plan(micro, accumulation, checkpointing))
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-3, atol=1e-5)


def test_a_resume_ends_with_the_same_bytes_as_a_run_that_never_stopped(tmp_path: Path) -> None:
    _, uninterrupted = train(tmp_path / "a", plan(4, 2), dropout=True)
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-3", tmp_path / "b" / "checkpoints" / "step-3")
    _, resumed = train(tmp_path / "b", plan(4, 2), dropout=True, resume_from=tmp_path / "b" / "checkpoints" / "step-3")
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    final = "final/adapter_model.safetensors"
    assert (tmp_path / "a" / final).read_bytes() == (tmp_path / "b" / final).read_bytes()


def test_a_run_leaves_verified_checkpoints_a_final_model_and_its_result(tmp_path: Path) -> None:
    result, _ = train(tmp_path, plan(8, 1))
    assert RunResult.load(tmp_path) == result
    assert (result.status, result.steps, result.stopped_early) == ("finished", 6, False)
    assert result.best is not None and result.best.step in {3, 6}
    for folder in (*(tmp_path / "checkpoints").iterdir(), tmp_path / "final"):
        verify_checkpoint(folder)
    assert not (tmp_path / "final" / "training_args.bin").exists()


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    result, _ = train(
        tmp_path, plan(8, 1), num_train_epochs=20, early_stopping_patience=2, early_stopping_min_delta=10.0
    )
    assert result.stopped_early
    assert result.steps == 9  # the first evaluation is the best; two without improvement follow
