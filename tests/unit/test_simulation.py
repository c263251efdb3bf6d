"""A simulated step is the real one: on every path, at every depth, and against live bytes on the CPU."""

import gc
import json

import pytest
import torch

from laras.config import RunConfig
from laras.errors import LarasError
from laras.models import recording, simulation
from laras.models.build import build_model
from laras.models.heads import PLAIN_HEAD_TYPES as HEADS_OF_MODELS
from laras.models.layer_kinds import decoder_layers
from laras.models.precision import torch_dtype
from laras.models.recording import Recorder
from laras.models.simulation import NotSimulated, trace_step
from laras.models.step import eager_step
from laras.planning import candidates
from laras.planning.allocator import replay
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.hardware import cpu_hardware
from laras.planning.memory import MemoryCase, estimate_memory
from laras.planning.trace import StepTrace
from laras.progress import Observer
from laras.records import PlanChoices

H100 = find_gpu("h100").to_hardware()
MIB = 2**20
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "vocab_size": 4096, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip


def shape(model_type, **keys):
    return {"model_type": model_type, **SIZES, **keys}


def choices(**keys):
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "packing": False, "max_length": 512, "finetuning_type": "lora",
        "load_in_4bit": False, "load_in_8bit": False, "precision": "bf16", "optim": "adamw_torch_fused",
        "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked", "lora_r": 8, "lora_alpha": 16.0,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "target_modules": ("all-linear",),
        "trainable_parameters": 1, "total_parameters": 1, "learning_rate": 1e-4, "eval_steps": 1, "save_steps": 1,
        "logging_steps": 1,
    }  # fmt: skip
    return PlanChoices(**{**defaults, **keys})


@pytest.fixture
def simulate(tmp_path):
    def run(values, layers=None, **keys):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return trace_step(
            RunConfig(model_name_or_path=str(tmp_path)), choices(**keys), layers or SIZES["num_hidden_layers"], H100
        )

    return run


def peak(trace):
    return max(size for kind, size in trace.unroll(SIZES["num_hidden_layers"]).peaks().items() if kind != "evaluation")


PATHS = {
    "fused": ("llama", {}),
    "fused, selective, accumulated": (
        "qwen2", {"gradient_checkpointing": True, "checkpoint_kind": "selective", "gradient_accumulation_steps": 4}
    ),
    "packed": ("llama", {"packing": True, "attention": "varlen"}),
    "plain, checkpointing": ("llama", {"fused_layers": False, "gradient_checkpointing": True}),
    "gpt_neox, dropout": ("gpt_neox", {"lora_dropout": 0.1, "loss_kind": "full"}),
    "gemma2, DoRA": ("gemma2", {"use_dora": True, "loss_kind": "full"}),
    "full fine-tuning": ("llama", {"finetuning_type": "full", "loss_kind": "full", "optim": "adamw_torch"}),
    "nf4": ("llama", {"load_in_4bit": True, "gradient_checkpointing": True}),
    "nf4, plain layers": ("gpt_neox", {"load_in_4bit": True, "loss_kind": "full"}),
    "int8": ("llama", {"load_in_8bit": True, "fused_layers": False, "gradient_checkpointing": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_short_trace_unrolled_is_the_whole_depth_request_for_request(simulate, monkeypatch, name):
    model_type, keys = PATHS[name]
    assert recorded_layers(simulate, monkeypatch, shape(model_type), **keys) == (6 if model_type == "gemma2" else 5)


def recorded_layers(simulate, monkeypatch, values, **keys):
    """Of a short trace, once it is found to be that of the whole depth."""
    layers = values["num_hidden_layers"]
    short = simulate(values, layers, **keys)
    monkeypatch.setattr(simulation, "_repeat", lambda *_: None)
    whole = simulate(values, layers, **keys)
    assert whole.layers == layers
    unrolled, recorded = short.unroll(layers), whole.unroll(layers)
    assert unrolled.peaks() == recorded.peaks()
    assert replay(unrolled.events) == replay(recorded.events)
    assert short.work(layers) == whole.work(layers)
    return short.layers


NARROW = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "vocab_size": 512, "sliding_window": 16,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LFM2 = [*["conv", "conv", "full_attention"] * 3, *["conv", "full_attention"] * 3, "conv"]
ALTERNATING = {  # layers, other keys, layers that are recorded
    "smollm3": (12, {}, 8),  # every fourth layer does not rotate
    "cohere2": (13, {}, 9),  # three of four slide
    "gemma3_text": (16, {}, 10),  # five of six slide
    "gpt_oss": (8, EXPERTS, 6),
    "llama4_text": (12, {**EXPERTS, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}, 8),
    "deepseek_v3": (9, {**EXPERTS, **LATENT}, 7),  # three dense layers
    "qwen3_next": (12, {**EXPERTS, **LINEAR}, 8),  # attention in one of four
    "lfm2": (16, {"layer_types": LFM2, "block_ff_dim": 96}, 12),
}


@pytest.mark.parametrize("model_type", ALTERNATING)
def test_so_is_that_of_a_model_whose_layers_alternate(simulate, monkeypatch, model_type):
    layers, keys, recorded = ALTERNATING[model_type]
    values = shape(model_type, **{**NARROW, **keys, "num_hidden_layers": layers})
    planned = {"fused_layers": False, "loss_kind": "full", "max_length": 32}
    assert recorded_layers(simulate, monkeypatch, values, gradient_checkpointing=True, **planned) == recorded


def test_a_shallow_model_of_other_layers_does_not_stand_for_the_whole(simulate):
    """The last four layers have no experts, which a shallow configuration cannot say."""
    values = shape("qwen2_moe", **{**NARROW, **EXPERTS, "num_hidden_layers": 10, "mlp_only_layers": [6, 7, 8, 9]})
    assert simulate(values, 10, loss_kind="full", fused_layers=False, max_length=32).layers == 10


def test_layers_that_loop_over_positions_are_simulated_in_short_rows(simulate, monkeypatch):
    values = {"model_type": "mamba", **NARROW, "state_size": 16, "num_hidden_layers": 6}
    planned = {"gradient_checkpointing": True, "fused_layers": False, "loss_kind": "full", "max_length": 192}
    monkeypatch.setattr(recording, "_MOST_OF_A_LAYER", 800)
    short = simulate(values, 6, **planned)
    monkeypatch.setattr(simulation, "_in_short_rows", lambda *_: None)
    whole = simulate(values, 6, **planned)
    requests = [sum(len(part.events) for part in trace.segments) for trace in (short, whole)]
    assert requests[0] < 0.4 * requests[1]
    assert short.unroll(6).peaks() == pytest.approx(whole.unroll(6).peaks(), rel=0.02)
    for kind, work in whole.work(6).items():
        found = short.work(6)[kind]
        assert (found.calls, found.graph_calls, found.engine_calls, found.kernels) == pytest.approx(
            (work.calls, work.graph_calls, work.engine_calls, work.kernels), rel=0.03
        )
        assert found.moved_bytes == pytest.approx(work.moved_bytes, rel=0.06)


def test_rows_are_not_cut_where_attention_sees_them(simulate, monkeypatch):
    planned = {"fused_layers": False, "max_length": 96}
    whole = simulate(shape("llama"), **planned)
    monkeypatch.setattr(recording, "_MOST_OF_A_LAYER", 20)
    assert simulate(shape("llama"), **planned) == whole
    monkeypatch.setattr(recording, "_MOST_OF_A_LAYER", 200)
    assert simulate(shape("llama"), **planned) == whole


def test_memory_grows_with_batch_length_and_rank(simulate):
    base = peak(simulate(shape("llama")))
    for more in ({"per_device_train_batch_size": 5}, {"max_length": 640}, {"lora_r": 16}):
        assert peak(simulate(shape("llama"), **more)) > base


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_closed_form_agrees_on_fused_layers(simulate, kind):
    on = kind != "none"
    # Wide enough that what is left out (rounding, rotations) is small.
    values = shape("llama", hidden_size=1024, intermediate_size=3072, vocab_size=32000)
    trace = simulate(values, gradient_checkpointing=on, checkpoint_kind=kind)
    case = MemoryCase(
        4, 512, checkpointing=on, fused=True, checkpoint_kind=kind, lora_r=8, loss_kind="chunked",
        loss_chunk_tokens=1024,
    )  # fmt: skip
    closed = estimate_memory(model_spec_from_config(values, "m"), case, H100, 1)
    expected = peak(trace) + closed.components["workspace"]
    assert closed.train_peak_allocated_bytes == pytest.approx(expected, rel=0.06)


PLAIN = {
    "LoRA": {},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, nf4": {"use_dora": True, "load_in_4bit": True},
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "full fine-tuning": {"finetuning_type": "full", "loss_kind": "full"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_the_closed_form_ranks_layers_of_transformers_right(simulate, name, checkpointing):
    values = shape("llama", hidden_size=1024, intermediate_size=3072, vocab_size=32000, num_key_value_heads=4)
    keys = {"lora_dropout": 0.0, "use_dora": False, "load_in_4bit": False, "load_in_8bit": False, **PLAIN[name]}
    trace = simulate(values, fused_layers=False, gradient_checkpointing=checkpointing, **keys)
    case = MemoryCase(
        4, 512, checkpointing=checkpointing, full=name == "full fine-tuning", lora_r=8,
        weights="nf4" if keys["load_in_4bit"] else "int8" if keys["load_in_8bit"] else "bf16",
        loss_kind=keys.get("loss_kind", "chunked"), loss_chunk_tokens=1024,
        dora=keys["use_dora"], dropout=keys["lora_dropout"] > 0,
    )  # fmt: skip
    closed = estimate_memory(model_spec_from_config(values, "m"), case, H100, 1)
    expected = peak(trace) + closed.components["workspace"]
    assert closed.train_peak_allocated_bytes == pytest.approx(expected, rel=0.1)


def test_what_a_simulated_model_holds_is_what_a_real_one_holds(simulate, tmp_path):
    values = shape("llama", torch_dtype="float32")
    trace = simulate(values, precision="fp32", fused_layers=False)
    simulated = trace.unroll(8).peaks()["weights"]
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    model = build_model(
        RunConfig(model_name_or_path=str(tmp_path)), choices(precision="fp32", fused_layers=False), "cpu", Observer()
    )
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    assert simulated == pytest.approx(sum(tensors.values()), rel=0.002)
    ids = torch.randint(1, 4096, (4, 64))
    eager_step(model)({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, torch.ones(()))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    peaks = trace.unroll(8).peaks()
    assert peaks["states"] - peaks["weights"] == pytest.approx(2 * gradients, rel=0.1)
    del model
    gc.collect()


def test_paged_states_leave_the_device(simulate):
    full = {"finetuning_type": "full", "loss_kind": "full"}
    values = shape("llama", hidden_size=512, intermediate_size=1024)  # smaller matrices keep their states
    exact = simulate(values, **full).unroll(8).peaks()
    paged = simulate(values, **full, optim="paged_adamw_8bit").unroll(8).peaks()
    assert paged["states"] - paged["weights"] < 0.02 * (exact["states"] - exact["weights"])


PRODUCTS_OF_THEIR_OWN = {  # by `@`, by `addmm`, by `baddbmm`
    "falcon": {"multi_query": True},
    "gpt2": {"n_embd": 256, "n_layer": 8, "n_head": 4, "vocab_size": 4096, "n_positions": 4096},
    "bloom": {"n_layer": 8, "n_head": 4},
    "nemotron": {},  # asks what autocast lowers to
}


@pytest.mark.parametrize("model_type", PRODUCTS_OF_THEIR_OWN)
def test_products_compute_in_half_precision_however_a_model_writes_them(simulate, model_type):
    attention = {"attention": "eager"} if model_type == "bloom" else {}
    trace = simulate(shape(model_type, **PRODUCTS_OF_THEIR_OWN[model_type]), loss_kind="full", **attention)
    products = trace.work(SIZES["num_hidden_layers"])["forward"].products
    large = [product for product, _ in products if product[0] >= 4 * 512]
    assert large and {element_bytes for *_, element_bytes in large} == {2}


def test_a_trace_survives_the_cache(simulate):
    trace = simulate(shape("llama"))
    assert StepTrace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


def test_a_model_that_cannot_be_simulated_says_so(simulate, monkeypatch):
    with pytest.raises(LarasError, match="cannot be loaded"):
        simulate({"model_type": "of-tomorrow", **SIZES})

    def unknown_operation(*_):
        raise NotImplementedError("aten::of_tomorrow has no meta kernel")

    monkeypatch.setattr("torch.nn.functional.embedding", unknown_operation)
    with pytest.raises(NotSimulated, match="of_tomorrow"):
        simulate(shape("llama"))


def test_what_planning_knows_of_the_paths_is_what_the_paths_say():
    from laras.models.fused.model import FUSED_TYPES as FUSED_OF_MODELS
    from laras.planning.fused_memory import FUSED_TYPES

    assert FUSED_TYPES == FUSED_OF_MODELS
    assert candidates.PLAIN_HEAD_TYPES == HEADS_OF_MODELS


def held_after_int8_product(device):
    """Bytes that the forward of an int8 layer leaves, its input apart, and those that it takes at most."""
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState

    from laras.models.quantized_meta import _register_int8

    _register_int8()
    torch.manual_seed(0)
    inputs = torch.randn(64, 256, dtype=torch.float16).clamp_(-5, 5)
    inputs[3, 7] = 8.0  # one outlier, as the simulation takes it for 256 columns
    inputs = inputs.to(device).requires_grad_()
    state = MatmulLtState()
    state.threshold, state.has_fp16_weights = 6.0, False
    state.CB = torch.ones(512, 256, dtype=torch.int8, device=device)
    state.SCB = torch.ones(512, device=device)
    recorder = Recorder([])
    with recorder:
        output = MatMul8bitLt.apply(inputs, state.CB, None, None, state)
        live = sum(size for size in live_bytes(recorder).values())
        output.sum().backward()
    return live, inputs.grad.nbytes


def live_bytes(recorder):
    return {key: reference().nbytes() for key, (reference, _) in recorder._live.items() if reference() is not None}


def test_an_int8_product_holds_on_meta_what_it_holds_on_the_cpu():
    assert held_after_int8_product("meta") == held_after_int8_product("cpu")


def test_an_int8_model_is_simulated_with_a_byte_a_weight(simulate):
    values = shape("llama")
    trace = simulate(values, load_in_8bit=True, fused_layers=False)
    spec = model_spec_from_config(values, "m")
    exact = simulate(values, fused_layers=False)
    saved = exact.unroll(8).peaks()["weights"] - trace.unroll(8).peaks()["weights"]
    assert saved == pytest.approx(spec.linear_parameters, rel=0.05)


def test_the_products_of_a_step_are_those_that_torch_counts(simulate, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"per_device_train_batch_size": 2, "max_length": 64, "precision": "fp32", "fused_layers": False}
    values = shape("llama", torch_dtype="float32")
    work = simulate(values, **small).work(SIZES["num_hidden_layers"])
    steps = [part for kind, part in work.items() if kind != "evaluation"]
    counted = sum(2 * m * k * n * count for part in steps for (m, k, n, _), count in part.products)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    model = build_model(RunConfig(model_name_or_path=str(tmp_path)), choices(**small), "cpu", Observer())
    ids = torch.randint(1, 4096, (2, 64))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter:
        eager_step(model)(batch, torch.ones(()))
    totals = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in totals.items() if "attention" not in str(op))
    assert counted == pytest.approx(products, rel=0.02)  # every token a target here, all but the last there


CPU_PATHS = {
    "llama": ("llama", {}),
    "llama, autocast": ("llama", {"precision": "bf16", "lora_r": 32}),
    "llama, autocast, checkpointing": ("llama", {"precision": "bf16", "lora_r": 32, "gradient_checkpointing": True}),
    "gpt_neox, full logits": ("gpt_neox", {"loss_kind": "full"}),
    "gpt_neox, full fine-tuning": ("gpt_neox", {"loss_kind": "full", "finetuning_type": "full"}),
}


@pytest.mark.parametrize("name", CPU_PATHS)
def test_a_simulated_step_holds_at_every_moment_what_real_tensors_hold(tmp_path, monkeypatch, name):
    """Attention by single operations, so that the CPU runs the very operations that meta tensors do."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = CPU_PATHS[name]
    planned = choices(
        attention="eager", fused_layers=False, optim="adamw_torch", max_length=128, **{"precision": "fp32", **keys}
    )
    dtype = torch_dtype(planned.precision)
    (tmp_path / "config.json").write_text(json.dumps(shape(model_type, torch_dtype=str(dtype).partition(".")[2])))
    config = RunConfig(model_name_or_path=str(tmp_path))
    trace = trace_step(config, planned, 8, cpu_hardware())
    simulated = trace.unroll(8).peaks()
    states = simulated["states"] - simulated["weights"]  # a real optimizer makes them after its first step

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=dtype).save_pretrained(tmp_path)
    monkeypatch.setattr(recording, "_DATA_DEPENDENT", {})  # here is data
    real = recorded_on_cpu(build_model(config, planned, "cpu", Observer()))
    assert real["weights"] == simulated["weights"]
    for moment in ("forward", "backward", "end"):
        assert real[moment] == simulated[moment] - states, moment
    if planned.loss_kind == "full":  # the simulation takes every token for a target, a real row's last one is none
        assert real["loss"] == pytest.approx(simulated["loss"] - states, rel=0.01)


def recorded_on_cpu(model):
    blocks = decoder_layers(model, 8)
    recorder = Recorder(blocks)
    owner = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    simulation._record_static(recorder, model, owner)
    with recorder:
        recorder.begin("batch")
        ids = torch.randint(1, 4096, (4, 128))
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, -1] = 0
        recorder.watch("forward", "loss", "backward")
        loss = eager_step(model)(batch, torch.ones(()))
        recorder.stop_watching()
        recorder.begin("end")
        del loss, batch, ids
    return recorder.trace({}).unroll(8).peaks()


def test_a_layer_is_whole_while_it_is_quantised_and_not_after(simulate):
    layers = SIZES["num_hidden_layers"]
    whole = simulate(shape("llama"), load_in_4bit=True).unroll(layers)
    loading = whole.until("states")
    taken = [event for event in loading if event > 0]
    passing = [taken[-event - 1] for event in loading if event < 0]
    assert len(passing) == 2 * 7 * layers  # weights and scales of seven layers each
    assert passing.count(2 * SIZES["hidden_size"] * SIZES["intermediate_size"]) == 3 * layers
    assert whole.live_after("weights") < simulate(shape("llama")).unroll(layers).live_after("weights")
