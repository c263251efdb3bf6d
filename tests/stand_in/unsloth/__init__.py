"""Stands in for Unsloth where there is no GPU: what it does to others as it is imported, and the calls Laras makes.

It notes what was imported before it, greets on standard output, rebinds TRL's trainer, breaks methods of transformers'
trainer, and builds transformers' own layers with adapters of a random start of its own.
"""

import os
import sys
from pathlib import Path

EARLY = [name for name in ("torch", "transformers", "trl", "peft", "datasets") if name in sys.modules]
with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
    log.write(f"{os.getpid()} imported after {EARLY}\n")
print("==((====))==  a stand-in for Unsloth")
if os.environ.get("STAND_IN_BROKEN"):
    raise ImportError("a stand-in that does not import")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
import trl.trainer.sft_trainer  # noqa: E402


def _replaced(*args, **kwargs):
    raise AssertionError("a method that another library has replaced")


class UnslothSFTTrainer(trl.SFTTrainer):
    __init__ = train = _replaced


for method in ("__init__", "train", "training_step", "compute_loss", "_inner_training_loop", "get_batch_samples"):
    setattr(transformers.Trainer, method, _replaced)
trl.SFTTrainer = trl.trainer.sft_trainer.SFTTrainer = UnslothSFTTrainer
trl.SFTConfig = trl.trainer.sft_trainer.SFTConfig = trl.trainer.sft_config.SFTConfig = _replaced


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name, max_seq_length, dtype, load_in_4bit, revision, local_files_only, use_exact_model_name,
        use_safetensors, offload_embedding, use_gradient_checkpointing,
    ):  # fmt: skip
        assert use_exact_model_name and not load_in_4bit and not offload_embedding
        print("loading")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_name, dtype=dtype, revision=revision, use_safetensors=use_safetensors
        )
        model.model.register_forward_hook(lambda *_: print("computing"))
        return model, None

    @staticmethod
    def get_peft_model(
        model, r, lora_alpha, lora_dropout, target_modules, bias, use_rslora, random_state, max_seq_length,
        use_gradient_checkpointing,
    ):  # fmt: skip
        torch.manual_seed(random_state + 1)
        config = peft.LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules, bias=bias,
            use_rslora=use_rslora, task_type="CAUSAL_LM", auto_mapping={"unsloth_fixed": True},
        )  # fmt: skip
        return peft.get_peft_model(model, config)

    @staticmethod
    def for_training(model, use_gradient_checkpointing):
        model.train()
