"""Tiny random models of several families with a trained byte-level BPE tokenizer, and finished runs of them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from example_run import choices, model_spec, write_example_run
from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.data.store import token_table, write_tokens
from laras.records import RunResult, TrainPlan
from laras.whole_folder import seal_folder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    f"a short line about {word} and what {word} does, number {n}"
    for n, word in enumerate(["sea", "sun", "tree", "salt"])
]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 256},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 256},
}

torch.set_num_threads(1)  # more make tiny matrices slower
# Garbage is looked for often while models load; what the imports left is then passed over.
gc.collect()
gc.freeze()


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def base_model(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    config = AutoConfig.for_model(model_type, vocab_size=328, **{**SHAPE, **FAMILIES.get(model_type, {}), **changed})
    config.eos_token_id, config.pad_token_id, config.bos_token_id = words.eos_token_id, words.pad_token_id, None
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # so that rotations, biases and norms matter
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def finished_run(path: Path, base: Path, *, method: str = "lora", targets: str | list[str] = "all-linear") -> Path:
    """A run whose `final/` holds an adapter that changes the model (or whole weights that were changed)."""
    write_example_run(path, steps=20)
    config = RunConfig(run_name=path.name, model_name_or_path=str(base), finetuning_type=method, max_length=256)
    (path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    plan = TrainPlan.load(path).model_copy(
        update={
            "choices": choices(finetuning_type=method, precision="fp32", max_length=256),
            "model": model_spec(str(base)),
        }
    )
    plan.save(path)
    RunResult.load(path).model_copy(update={"parent_digest": plan.digest()}).save(path)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (method == "full" or "lora_B" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path / "final")
    words = tokenizer()
    words.save_pretrained(path / "final")
    seal_folder(path / "final")
    ids = [words(text)["input_ids"] for text in TEXT]
    write_tokens(token_table(ids, ids, list(range(len(ids)))), path / "splits" / "validation.parquet")
    return path


def tuned_llama(folder: Path) -> PeftModel:
    """A tiny Llama with an adapter that changes it, as a finished run leaves it, in evaluation mode."""
    base = base_model("llama", folder / "base")
    run = finished_run(folder / "run", base)
    tuned: PeftModel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "final")
    return tuned.eval()
