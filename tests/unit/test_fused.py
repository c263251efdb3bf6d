"""Fused layers give the losses and gradients of the plain padded path; packed documents do not see each other."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

from laras.config import RunConfig
from laras.data.collate import PadCollator
from laras.data.pack import PackCollator
from laras.models.build import build_model
from laras.models.fused import kernels, variant
from laras.models.fused.model import fused_refusal, kernel_sizes
from laras.models.fused.selfcheck import disagreement
from laras.models.fused.variant import Variant
from laras.models.graphs import GraphedStep, train_step
from laras.models.step import eager_step, summed_loss, target_losses
from laras.planning.architecture import load_model_spec
from laras.progress import Observer
from laras.records import PlanChoices

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 4, "long_factor": [9.0] * 4}
PHI3 = {**SIZES, "pad_token_id": 0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral, no window": MistralConfig(**SIZES, sliding_window=None),
    "mistral, wide window": MistralConfig(**SIZES, sliding_window=32),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, wide heads": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "phi3": Phi3Config(**PHI3),
    "phi3, part rotated": Phi3Config(**{**PHI3, "hidden_size": 64}, partial_rotary_factor=0.75),
    "phi3, longrope": Phi3Config(**PHI3, rope_parameters=LONGROPE),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "smollm3": SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layer_interval=2),
}
PLAIN = {  # and why their layers are not fused
    "mistral, narrow window": (
        MistralConfig(**SIZES, sliding_window=31),
        "sliding-window attention: documents of 32 tokens, at most 31",
    ),
    "qwen2, window": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding-window attention: documents of 32 tokens, at most 8",
    ),
    "phi3, longrope": (
        Phi3Config(**{**PHI3, "original_max_position_embeddings": 16}, rope_parameters=LONGROPE),
        "longrope: documents of 32 tokens, at most 16",
    ),
    "llama, dynamic": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        "the rotation dynamic",
    ),
    "llama, dropout": (LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout 0.1"),
    "llama, relu": (LlamaConfig(**SIZES, hidden_act="relu"), "the activation relu"),
    "gemma, gelu": (GemmaConfig(**SIZES, head_dim=8, hidden_act="gelu"), "the activation gelu"),
    "qwen3, odd heads": (Qwen3Config(**SIZES, head_dim=12), "heads of 12 channels"),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8), "gemma2"),
    "qwen2_moe": (Qwen2MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=16), "qwen2_moe"),
}
LENGTHS = (5, 17, 9, 1, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # random biases and norms, or a lost one would go unseen
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        found[name] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def expected(folders):
    """Loss and gradient of the plain padded path."""

    @functools.cache
    def of(name):
        return step(built(folders[name], packing=False, fused_layers=False, loss_kind="full"), PadCollator(0)(rows()))

    return of


def choices(**changes):
    values = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "packing": True, "max_length": 32, "finetuning_type": "lora",
        "load_in_4bit": False, "load_in_8bit": False, "precision": "fp32", "optim": "adamw_torch",
        "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked", "lora_r": 4, "lora_alpha": 8.0,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "trainable_parameters": 0, "total_parameters": 0,
        "target_modules": ("all-linear",),
        "learning_rate": 1e-4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "mlp_chunk_tokens": 16,
        "loss_chunk_tokens": 7,
    }  # fmt: skip
    return PlanChoices(**{**values, **changes})


def built(folder, **changes):
    model = build_model(RunConfig(model_name_or_path=folder), choices(**changes), "cpu", Observer())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows():
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 96, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def packed(documents):
    return PackCollator(48, 8, max_length=32, max_targets=40)(documents)


def step(model, batch):
    model.zero_grad()
    loss = eager_step(model)(batch, torch.tensor(0.5))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item(), gradient


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > 0.999999
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["none", "selective", "full", "offload", "transformers"])
def test_every_path_gives_the_loss_and_gradient_of_the_plain_padded_one(folders, expected, name, kind):
    changes = {"fused_layers": False} if kind == "transformers" else {"checkpoint_kind": kind}
    model = built(folders[name], gradient_checkpointing=kind not in ("none", "transformers"), **changes)
    assert (model.laras_path.fused is not None) == (kind != "transformers")
    same(step(model, packed(rows())), expected(name))
    same(step(model, PadCollator(0)(rows())), expected(name))
    without_places = {key: value for key, value in packed(rows()).items() if key != "target_positions"}
    same(step(model, without_places), expected(name))


@pytest.mark.parametrize("flag", [field.name for field in dataclasses.fields(Variant)])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_every_variant_gives_the_same(folders, expected, monkeypatch, flag, kind):
    other = dataclasses.replace(variant.CHOSEN, **{flag: not getattr(variant.CHOSEN, flag)})
    monkeypatch.setattr(variant, "CHOSEN", other)
    for name in ("qwen2", "qwen3", "smollm3"):
        model = built(folders[name], gradient_checkpointing=kind != "none", checkpoint_kind=kind)
        assert model.laras_path.fused.layers[0].variant == other
        same(step(model, packed(rows())), expected(name))


def offloading(folder, **changes):
    return built(folder, gradient_checkpointing=True, checkpoint_kind="offload", **changes)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    torch.manual_seed(0)
    place = str(tmp_path_factory.mktemp("deep"))
    AutoModelForCausalLM.from_config(Qwen3Config(**{**SIZES, "num_hidden_layers": 5}, head_dim=8)).save_pretrained(
        place
    )
    return place


def test_inputs_in_main_memory_change_no_bit(deep_folder):
    kept = built(deep_folder, gradient_checkpointing=True, checkpoint_kind="full")
    model = offloading(deep_folder)
    for batch in (packed(rows()), PadCollator(0)(rows()), packed(rows()[:2]), packed(rows())):
        (loss, gradient), (expected_loss, expected) = step(model, batch), step(kept, batch)
        assert loss == expected_loss
        assert torch.equal(gradient, expected)
    assert model.laras_path.fused._inputs.host_bytes == 4 * 4 * 128 * 32  # of 120 tokens and all layers but the last


def test_what_goes_no_way_back_stays_on_the_device(folders):
    model = offloading(folders["qwen2"])
    with torch.no_grad():
        loss = summed_loss(model, packed(rows()))
    assert model.laras_path.fused._inputs.host_bytes == 0
    assert loss == step(model, packed(rows()))[0]


def test_a_step_that_ended_early_leaves_nothing_to_the_next(deep_folder):
    model = offloading(deep_folder)
    expected = step(model, packed(rows()))

    def dies(_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    first = next(parameter for name, parameter in model.named_parameters() if "layers.2" in name and "lora_A" in name)
    handle = first.register_hook(dies)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step(model, packed(rows()))
    handle.remove()
    half = step(model, packed(rows()[:3]))
    assert half[0] < expected[0]
    again = step(model, packed(rows()))
    assert again[0] == expected[0]
    assert torch.equal(again[1], expected[1])


def test_a_step_that_copies_to_main_memory_is_not_captured(folders):
    told = []
    observer = Observer()
    observer.warning = told.append
    model = offloading(folders["qwen2"])
    made = train_step(model, choices(gradient_checkpointing=True, checkpoint_kind="offload", cuda_graph=True), observer)
    assert not isinstance(made, GraphedStep)
    assert len(told) == 1 and "is not captured as a CUDA graph" in told[0]


def test_layers_keep_what_they_are_told_from_then_on(folders, expected):
    model = built(folders["qwen2"])
    for kind in ("offload", "full", "none", "selective", "offload"):
        model.laras_path.fused.keep(kind)
        assert model.laras_path.fused.offloads == (kind == "offload")
        same(step(model, packed(rows())), expected("qwen2"))


def test_inputs_in_host_memory_are_those_of_the_step_that_goes_backward(folders):
    model = offloading(folders["qwen2"])
    first = summed_loss(model, packed(rows()))
    second = summed_loss(model, packed(rows()))
    with pytest.raises(RuntimeError, match="each forward pass needs its backward first"):
        first.backward()
    second.backward()


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Of a size that 4-bit blocks divide."""
    found = {}
    wide = {**SIZES, "hidden_size": 64, "intermediate_size": 192}
    for name, config in (("qwen3", Qwen3Config(**wide, head_dim=16)), ("phi3", Phi3Config(**wide, pad_token_id=0))):
        torch.manual_seed(0)
        found[name] = str(tmp_path_factory.mktemp("wide"))
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
@pytest.mark.parametrize("kind", ["none", "selective", "full", "offload"])
def test_4bit_layers_give_the_loss_and_gradient_of_bitsandbytes_own(wide_folder, name, kind):
    pytest.importorskip("bitsandbytes")
    plain = built(wide_folder[name], packing=False, fused_layers=False, loss_kind="full", load_in_4bit=True)
    expected = step(plain, PadCollator(0)(rows()))
    model = built(wide_folder[name], gradient_checkpointing=kind != "none", checkpoint_kind=kind, load_in_4bit=True)
    fused = model.laras_path.fused
    assert fused.layers[0].qkv.is_quantized
    same(step(model, packed(rows())), expected)
    assert all(group.storage.numel() == 0 for layer in fused.layers for group in layer.groups)


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_layers_do_not_follow_stays_plain_and_planning_knows_it(tmp_path, name):
    config, reason = PLAIN[name]
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # one that exists
    config.architectures = None
    config.save_pretrained(tmp_path)
    texts = []
    observer = Observer()
    observer.message = texts.append
    model = build_model(RunConfig(model_name_or_path=str(tmp_path)), choices(), "meta", observer)
    assert model.laras_path.fused is None
    assert texts == [f"layers of transformers: no fused layers for {reason}"]
    spec = load_model_spec(tmp_path)
    assert spec.fused_refusal is not None or spec.fused_longest_tokens < 32


@pytest.mark.parametrize("name", CONFIGS)
def test_planning_knows_which_layers_are_fused(folders, name):
    spec = load_model_spec(folders[name])
    assert spec.fused_refusal is None
    assert (spec.fused_longest_tokens or 32) >= 32


def test_planning_reads_what_a_configuration_leaves_out_as_transformers_does(tmp_path):
    for model_type, longest in (
        ("mistral", 4096),
        ("qwen2", None),
        ("qwen3", None),
        ("phi3", None),
        ("gemma", None),
        ("smollm3", None),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, "pad_token_id": 0}))
        assert load_model_spec(tmp_path).fused_longest_tokens == longest
        model = build_model(
            RunConfig(model_name_or_path=str(tmp_path)), choices(max_length=longest or 10**6), "meta", Observer()
        )
        assert model.laras_path.fused is not None
        refusal = fused_refusal(model, (longest or 10**6) + 1)
        assert (refusal is None) == (longest is None)


@pytest.mark.parametrize("name", ["qwen3", "phi3, part rotated", "gemma"])
def test_a_kernel_that_is_wrong_on_a_device_is_found_before_the_run(folders, name):
    sizes = kernel_sizes(built(folders[name]), torch.bfloat16)
    assert disagreement(sizes, torch.device("cpu")) is None
    called = ["rms_norm_", "rms_norm_backward_", "rope_", "swiglu_", "swiglu_backward_"]
    if sizes.head_norm:
        called += ["head_norm_", "head_norm_backward_"]

    def leaves(*_):
        pass

    def fails(*_):
        raise RuntimeError("out of resource: shared memory")

    for one in called:
        broken = SimpleNamespace(**{**vars(kernels), one: leaves})
        assert "does not give its reference's result" in disagreement(sizes, torch.device("cpu"), broken)
        setattr(broken, one, fails)
        assert "does not run here: out of resource" in disagreement(sizes, torch.device("cpu"), broken)


def test_a_kernel_that_cannot_be_launched_directly_is_found_before_the_run(folders):
    """The first launch is Triton's own; what another version of Triton expects of a direct one shows in the second."""
    calls = []

    def runs_once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise TypeError("function takes exactly 18 arguments")
        kernels.rms_norm_(*args)

    sizes = kernel_sizes(built(folders["qwen2"]), torch.bfloat16)
    broken = SimpleNamespace(**{**vars(kernels), "rms_norm_": runs_once})
    assert "norm does not run here: function takes" in disagreement(sizes, torch.device("cpu"), broken)


def test_layers_of_a_models_own_code_stay_plain(folders):
    class Own(LlamaForCausalLM):
        pass

    model = built(folders["llama"])
    model.get_base_model().__class__ = Own
    assert fused_refusal(model, 32) == "no fused layers for a model's own code"


def test_changing_one_document_changes_no_other_loss(folders):
    model = built(folders["qwen2"])
    documents = rows()
    silent = [{**documents[1], "labels": [-100] * LENGTHS[1]}, *documents[2:]]
    changed = [{**silent[0], "input_ids": [7] * LENGTHS[1]}, *documents[2:]]
    with torch.no_grad():
        assert summed_loss(model, packed(silent)) == summed_loss(model, packed(changed))


def test_adapters_that_change_are_taken_over(folders):
    model = built(folders["llama"])
    before = summed_loss(model, packed(rows())).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        summed_loss(model, packed(rows())).backward()
        optimizer.step()
    assert summed_loss(model, packed(rows())).item() < before
    path, model.laras_path = model.laras_path, None
    plain = summed_loss(model, PadCollator(0)(rows())).item()
    model.laras_path = path
    assert summed_loss(model, packed(rows())).item() == pytest.approx(plain, rel=1e-5)


def test_adapters_that_a_capture_would_have_taken_over_are_taken_over_after_one_that_failed(folders, monkeypatch):
    model = built(folders["llama"])
    fused, batch = model.laras_path.fused, packed(rows())
    before = step(model, batch)[0]
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(0.01)
    with monkeypatch.context() as capturing:  # whose copies are only noted
        for group in (group for layer in fused.layers for group in layer.groups):
            capturing.setattr(group, "_places", [])
        fused.refresh(always=True)
    found = step(model, batch)[0]
    fused.refresh(always=True)
    assert found == step(model, batch)[0] != before


def test_disabled_adapters_are_honoured(folders):
    model = built(folders["qwen2"])
    fused = model.laras_path.fused
    with torch.no_grad(), model.disable_adapter():
        assert fused.refusal() == "adapters are disabled or merged"
        base = summed_loss(model, packed(rows())).item()
    assert fused.refusal() is None
    assert base != pytest.approx(summed_loss(model, packed(rows())).item(), rel=1e-4)


def test_what_fused_layers_refuse_is_said(folders):
    texts = []
    observer = Observer()
    observer.message = texts.append
    config = RunConfig(model_name_or_path=folders["qwen2"])
    build_model(config, choices(lora_dropout=0.1), "cpu", observer)
    assert texts == ["layers of transformers: no fused layers for adapter dropout, DoRA or trained biases"]


def test_a_step_runs_on_meta_tensors(folders):
    config = RunConfig(model_name_or_path=folders["qwen2"])
    model = build_model(config, choices(precision="bf16", gradient_checkpointing=True), "meta", Observer())
    batch = {key: value.to("meta") for key, value in packed(rows()).items()}
    eager_step(model)(batch, torch.ones((), device="meta"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("loss_kind", ["chunked", "full"])
def test_layers_of_transformers_compute_in_half_precision_while_their_adapters_are_in_fp32(folders, loss_kind):
    """In training and in validation, by the decoder alone (chunked) and by the whole model, as plans assume."""
    changes = {"packing": False, "fused_layers": False, "loss_kind": loss_kind, "precision": "bf16"}
    model = built(folders["qwen2"], **changes)
    adapters = [part for name, part in model.named_modules() if name.endswith("lora_A.default")]
    types = []
    for part in adapters:
        part.register_forward_hook(lambda _module, _inputs, output: types.append(output.dtype))
    batch = PadCollator(0)(rows())
    eager_step(model)(batch, torch.tensor(1.0))
    model.eval()
    with torch.no_grad():
        target_losses(model, batch)
    assert len(types) == 2 * len(adapters) > 0
    assert set(types) == {torch.bfloat16} and {part.weight.dtype for part in adapters} == {torch.float32}
