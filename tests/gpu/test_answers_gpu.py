"""Answers for the report on a GPU: in a batch they are those of one by one, and take a fraction of the time.

The times are shown with `pytest tests/gpu/test_answers_gpu.py -s`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from laras.evaluation.generate import GenerationSettings, answer_prompts, prompt_ids, stream_answer
from tiny_models import base_model, tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS, TOKENS = 8, 64


def test_a_batch_gives_the_answers_of_one_by_one_in_less_than_half_of_the_time(tmp_path: Path) -> None:
    words = tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base_model("llama", tmp_path, num_hidden_layers=30))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).cuda().eval()
    prompts = [prompt_ids(words, [{"role": "user", "content": "a tree " * (1 + n)}]) for n in range(PROMPTS)]
    settings = GenerationSettings(max_new_tokens=TOKENS, temperature=0.0)
    stream_answer(adapted, words, prompts[0], settings)  # kernels are loaded at first use
    started = time.perf_counter()
    alone = [stream_answer(adapted, words, ids, settings) for ids in prompts]
    between = time.perf_counter()
    together = answer_prompts(adapted, words, prompts, settings)
    batch_s, alone_s = time.perf_counter() - between, between - started
    print(f"{PROMPTS} answers of {TOKENS} tokens: {alone_s:.1f} s one by one, {batch_s:.1f} s in a batch")
    assert together == alone
    assert batch_s < alone_s / 2
