"""Which backend runs, and every reason why it is not the one that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from example_run import model_spec
from laras.config import RunConfig
from laras.data.pack import PackCollator
from laras.models.lora import attach_lora
from laras.models.unsloth import hidden_states, import_first, set_initial_adapters
from laras.planning import backend
from laras.planning.backend import MEASURED, Comparison, choose_backend
from laras.planning.catalogue import find_gpu
from laras.planning.memory import MemoryCase, estimate_memory
from laras.planning.planner import plan_training
from laras.records import ModelSpec
from tiny_models import base_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "throughput.jsonl"
H100 = (9, 0)
UNSLOTH = RunConfig(backend="unsloth")


def spec(**changed: Any) -> ModelSpec:
    return model_spec().model_copy(update={"model_type": "llama", **changed})


def qwen2(tie: bool, vocabulary: int, **shape: int) -> ModelSpec:
    head_dim, width = 128, shape["intermediate_size"]
    hidden, key_value = shape["hidden_size"], shape["key_value_heads"] * head_dim
    linear = 28 * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * width)
    embedding = (1 if tie else 2) * vocabulary * hidden
    return spec(
        model_type="qwen2", layers=28, head_dim=head_dim, vocab_size=vocabulary, tie_word_embeddings=tie,
        total_parameters=linear + embedding, linear_parameters=linear, embedding_parameters=embedding, **shape,
    )  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "is_installed", lambda: True)


def test_without_unsloth_the_own_layers_run_and_the_plan_says_why() -> None:
    choice = choose_backend(UNSLOTH, spec(), H100, "fused")
    assert choice.name == "transformers"
    assert choice.refusal is not None and "pip install 'laras[unsloth]'" in choice.refusal
    assert choice.reason.startswith("with Laras' fused layers: Unsloth was asked for, but it is not installed")
    assert choose_backend(RunConfig(), spec(), H100, "fused").reason == "with Laras' fused layers"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "changed", "capability", "words"),
    [
        ({}, {}, None, "needs an NVIDIA GPU"),
        ({}, {}, (6, 1), "this GPU has 6.1"),
        ({}, {"model_type": "gemma2"}, H100, "gemma2 is not among the families"),
        ({}, {"fused_refusal": "no fused layers for the rotation dynamic"}, H100, "the rotation dynamic"),
        ({"max_length": 8192}, {"fused_longest_tokens": 4096}, H100, "a window of 4096 tokens"),
        ({"finetuning_type": "full"}, {}, H100, "finetuning_type: full"),
        ({"use_dora": True}, {}, H100, "use_dora"),
        ({"load_in_8bit": True}, {}, H100, "load_in_8bit"),
        ({"precision": "fp32"}, {}, H100, "precision: fp32"),
        ({"loss_kind": "full"}, {}, H100, "loss_kind: full"),
        ({"attn_implementation": "eager"}, {}, H100, "attn_implementation: eager"),
        ({"full_determinism": True}, {}, H100, "full_determinism"),
        ({"lora_target_modules": ("q_proj", "lm_head")}, {}, H100, "lora_target_modules: lm_head is not"),
        ({"trust_remote_code": True}, {}, H100, "trust_remote_code"),
    ],
)
def test_what_unsloth_cannot_do_is_named(
    config: dict[str, Any], changed: dict[str, Any], capability: tuple[int, int] | None, words: str
) -> None:
    asked = RunConfig(backend="unsloth", **config)
    choice = choose_backend(asked, spec(**changed), capability, "transformers")
    assert choice.name == "transformers"
    assert choice.refusal is not None and words in choice.refusal
    assert words in choice.reason


@pytest.mark.usefixtures("installed")
def test_several_reasons_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refusal = choose_backend(RunConfig(backend="unsloth", use_dora=True), spec(), (6, 1), "fused").refusal
    assert refusal is not None
    assert all(words in refusal for words in ("6.1", "not with 2", "use_dora"))


@pytest.mark.usefixtures("installed")
def test_what_can_run_runs_when_asked_for_and_an_import_that_failed_does_not() -> None:
    assert choose_backend(UNSLOTH, spec(), (7, 5), "fused").name == "unsloth"
    failed = choose_backend(UNSLOTH, spec(), H100, "fused", "its import fails: no library libcuda.so")
    assert failed.name == "transformers" and "libcuda.so" in failed.reason


@pytest.mark.usefixtures("installed")
def test_auto_follows_the_measured_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    own = choose_backend(RunConfig(), spec(), H100, "fused")
    assert own.name == "transformers" and own.reason == "fused layers: 1.3 to 2.7 times as fast as Unsloth, measured"
    unknown = choose_backend(RunConfig(), spec(), H100, "transformers")
    assert unknown.name == "transformers" and "no measured figure" in unknown.reason
    monkeypatch.setattr(backend, "MEASURED", (Comparison("fused", "a", False, False, 100.0, 150.0),))
    assert choose_backend(RunConfig(load_in_4bit=False), spec(), H100, "fused").name == "unsloth"
    assert choose_backend(RunConfig(load_in_4bit=True), spec(), H100, "fused").name == "transformers"
    slower = Comparison("fused", "b", True, True, 100.0, 50.0)
    monkeypatch.setattr(backend, "MEASURED", (*backend.MEASURED, slower))
    assert choose_backend(RunConfig(), spec(), H100, "fused").name == "transformers"


def test_the_figures_are_those_of_the_published_measurement() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    own = {(line["name"], line.get("useful_tokens_per_s")) for line in lines}
    peer = {line.get("useful_tok_s") for line in lines if str(line.get("name")).startswith("unsloth")}
    assert len(MEASURED) == 7
    for case in MEASURED:
        assert (case.case, case.own_tokens_per_s) in own
        assert case.unsloth_tokens_per_s in peer


@pytest.mark.usefixtures("installed")
def test_a_plan_for_unsloth_is_an_upper_bound_with_a_margin_and_says_so() -> None:
    config = RunConfig(backend="unsloth", max_length=1024)
    card = find_gpu("t4").to_hardware()
    plan = plan_training(config, None, None, spec(), card)
    assert (plan.choices.backend, plan.choices.fused_layers, plan.choices.attention) == ("unsloth", False, "unsloth")
    assert plan.reasons["backend"] == "as configured"
    assert plan.memory.method == "closed-form of plain layers"
    assert plan.memory.train_peak_reserved_bytes <= 0.9 * plan.memory.device_budget_bytes
    refused = plan_training(config.model_copy(update={"use_dora": True}), None, None, spec(), card)
    assert refused.choices.backend == "transformers"
    assert any("use_dora is not supported with it" in warning for warning in refused.warnings)


def test_unsloth_took_less_than_the_closed_form_of_plain_layers_in_every_case_measured() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    peaks = {line.get("useful_tok_s"): line.get("peak_alloc_gb") for line in lines}
    small = {"hidden_size": 1536, "attention_heads": 12, "key_value_heads": 2, "intermediate_size": 8960}
    large = {"hidden_size": 3584, "attention_heads": 28, "key_value_heads": 4, "intermediate_size": 18944}
    card = find_gpu("h100").to_hardware()
    for measured in MEASURED:
        shape = large if measured.case.startswith("7b") else small
        rows = 4 if measured.case.endswith("16k") else 2
        model = qwen2(tie=shape is small, vocabulary=151936 if shape is small else 152064, **shape)
        case = MemoryCase(
            micro_batch=rows, length_tokens=4096, checkpointing=measured.checkpointing, loss_kind="chunked",
            weights="nf4" if measured.quantised else "bf16", lora_r=16, loss_chunk_tokens=1024,
        )  # fmt: skip
        predicted = estimate_memory(model, case, card, card.total_bytes).train_peak_allocated_bytes / 2**30
        assert 0.55 < peaks[measured.unsloth_tokens_per_s] / predicted < 0.85, measured.case


def test_a_process_that_has_torch_already_is_refused() -> None:
    failure = import_first(with_trial=True)
    assert failure is not None and failure.startswith("torch, transformers") and "laras train" in failure


def test_adapters_begin_as_on_every_other_path(tmp_path: Path) -> None:
    folder = base_model("qwen2", tmp_path / "model")
    names = ["q_proj", "v_proj", "down_proj"]
    settings = {"target_modules": names, "r": 4, "alpha": 8.0}
    wanted = attach_lora(AutoModelForCausalLM.from_pretrained(folder), seed=7, **settings)
    model = attach_lora(AutoModelForCausalLM.from_pretrained(folder), seed=8, **settings)
    before = torch.get_rng_state()
    set_initial_adapters(model, 7)
    assert torch.equal(before, torch.get_rng_state())
    expected = dict(wanted.named_parameters())
    adapters = {name: one for name, one in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 12
    for name, parameter in adapters.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad and parameter.dtype == torch.float32


def test_documents_of_a_packed_batch_are_told_to_unsloth_by_their_lengths(tmp_path: Path) -> None:
    """transformers keeps them apart by the same position ids that Unsloth is given."""
    model = AutoModelForCausalLM.from_pretrained(base_model("llama", tmp_path / "model")).eval()
    told: dict[str, Any] = {}
    model.model.register_forward_pre_hook(lambda _, args, kwargs: told.update(kwargs), with_kwargs=True)
    rows = [{"input_ids": list(range(5, 5 + size)), "labels": list(range(5, 5 + size))} for size in (7, 3)]
    batch = PackCollator(budget_tokens=16, max_documents=6, max_length=8)(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = hidden_states(model, inputs)
        alone = [model.model(torch.tensor([row["input_ids"]])).last_hidden_state for row in rows]
    assert told["packed_seq_lengths"].tolist() == [7, 3, 6]
    assert "cu_seqlens" not in told
    torch.testing.assert_close(packed[:, :10], torch.cat(alone, dim=1))
