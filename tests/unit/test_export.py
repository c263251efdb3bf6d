"""What is exported loads with other tools and computes what the tuned model computes; what does not is not left."""

from __future__ import annotations

import errno
import json
import os
import shutil

import gguf
import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import tiny_models
from example_run import write_example_run
from laras.config import RunConfig
from laras.errors import CheckpointError, ConfigError, LarasError, RunStateError
from laras.reporting import export, gguf_file, model_card
from laras.reporting.export import export_run
from laras.reporting.gguf_file import llama3_frequency_factors
from laras.reporting.gguf_reading import read_gguf
from laras.reporting.gguf_tokenizer import gguf_tokenizer, write_tokenizer

PROMPT = "a short line about salt and what"


def logits(model, ids):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits.float()


def reference(run, base):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "final")
    ids = AutoTokenizer.from_pretrained(run / "final")(PROMPT)["input_ids"]
    return logits(model, ids), ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_models.base_model("llama", folder / "base")
    return tiny_models.finished_run(folder / "run", base), base


def test_an_adapter_loads_with_peft_alone_and_computes_the_same(llama, tmp_path):
    run, base = llama
    done = export_run(run, "adapter", output=tmp_path / "out")
    expected, ids = reference(run, base)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model, ids), expected)
    assert done.max_logit_difference is None
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_of_the_builtin_model_names_the_base_that_others_can_load(tmp_path, llama):
    run = tiny_models.finished_run(tmp_path / "run", llama[1])
    text = (run / "config.yaml").read_text().replace(str(llama[1]), "builtin:smollm2-135m")
    (run / "config.yaml").write_text(text)
    export_run(run, "adapter", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_keep_the_dtype_of_the_base_and_load_in_a_pipeline(tmp_path, dtype):
    base = tiny_models.base_model("qwen2", tmp_path / "base", dtype)
    run = tiny_models.finished_run(tmp_path / "run", base)
    done = export_run(run, "merged")
    assert done.path == run / "export" / "merged"
    assert 0 <= done.max_logit_difference <= done.tolerance
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert loaded.dtype == dtype
    assert not list(done.path.glob("adapter*"))
    assert len({path.stat().st_mode for path in done.path.iterdir()}) == 1  # who may read one file may read the model
    expected, ids = reference(run, base)
    assert (logits(loaded, ids) - expected).abs().max() <= done.tolerance
    changed_by_tuning = (logits(AutoModelForCausalLM.from_pretrained(base), ids) - expected).abs().max()
    assert changed_by_tuning > 2 * done.tolerance  # the tolerance can tell the tuned model from its base
    chat = pipeline("text-generation", model=str(done.path), device="cpu")
    answer = chat([{"role": "user", "content": "sea"}], max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_a_merge_that_computes_something_else_fails_and_leaves_nothing(llama, tmp_path, monkeypatch):
    merge = export._merge

    def wrong(run, final):
        model, expected = merge(run, final)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return model, expected

    monkeypatch.setattr(export, "_merge", wrong)
    for form in ("merged", "gguf"):
        with pytest.raises(CheckpointError, match="differs from the adapter model by"):
            export_run(llama[0], form, output=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_file_in_which_one_row_is_a_little_off_fails_and_leaves_nothing(llama, tmp_path, monkeypatch):
    real = gguf_file._add_tensor

    def off(writer, name, values, quantization):
        if name == "blk.0.ffn_up.weight":
            values = values.copy()
            values[0] *= 1.02  # less than rounding to eight bits changes elsewhere
        real(writer, name, values, quantization)

    monkeypatch.setattr(gguf_file, "_add_tensor", off)
    with pytest.raises(CheckpointError, match="differs from the model with its weights rounded as stored by"):
        export_run(llama[0], "gguf", output=tmp_path / "out", quantization="q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_gguf_of_every_family_loads_back_and_computes_the_same(tmp_path, family, quantization):
    base = tiny_models.base_model(family, tmp_path / "base")
    run = tiny_models.finished_run(tmp_path / "run", base)
    done = export_run(run, "gguf", quantization=quantization)
    expected, ids = reference(run, base)
    config = AutoConfig.from_pretrained(base)
    given = {} if gguf_file.is_described_whole(config) else {"config": config}
    if family in ("gemma", "phi"):  # which transformers' reader does not know
        loaded = read_gguf(done.path / "model.gguf")
    else:
        assert ("moe" in family) == bool(given)
        loaded = AutoModelForCausalLM.from_pretrained(done.path, gguf_file="model.gguf", **given)
    scale = expected.abs().max()
    assert done.compared_with == "the model with its weights rounded as stored"
    assert done.max_logit_difference <= done.tolerance <= 2e-4 * max(1, scale)
    assert done.rounding_logit_difference > 0
    if "moe" not in family:
        assert (logits(loaded, ids) - expected).abs().max() <= (0.01 if quantization == "f16" else 0.06) * scale
    else:  # rounding may choose other experts for a token or two, and leaves the rest as it is
        farthest_T = (logits(loaded, ids) - expected)[0].abs().amax(-1)
        assert farthest_T.median() <= 0.06 * scale
    reader = gguf.GGUFReader(done.path / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == ({"F16", "F32"} if quantization == "f16" else {"Q8_0", "F32"})
    assert reader.get_field("tokenizer.chat_template").contents() == tiny_models.CHATML
    words = AutoTokenizer.from_pretrained(run / "final")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens[: len(words)] == words.convert_ids_to_tokens(range(len(words)))
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == words.eos_token_id


def test_gguf_of_an_untied_llama_with_scaled_rotation_holds_the_frequency_factors(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    base = tiny_models.base_model("llama", tmp_path / "base", rope_parameters=rope, tie_word_embeddings=False)
    run = tiny_models.finished_run(tmp_path / "run", base)
    done = export_run(run, "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(done.path / "model.gguf").tensors}
    assert "output.weight" in tensors
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"].data, model.model.rotary_emb.inv_freq, rtol=1e-5)
    np.testing.assert_allclose(llama3_frequency_factors(model.config), tensors["rope_freqs.weight"].data)


def test_gguf_of_a_long_and_partial_rotation_holds_both_sets_of_factors(tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    base = tiny_models.base_model(
        "phi3", tmp_path / "base", rope_parameters=rope, original_max_position_embeddings=64, tie_word_embeddings=True
    )
    run = tiny_models.finished_run(tmp_path / "run", base)
    done = export_run(run, "gguf")
    reader = gguf.GGUFReader(done.path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_allclose(tensors["rope_factors_short.weight"], rope["short_factor"])
    np.testing.assert_allclose(tensors["rope_factors_long.weight"], rope["long_factor"])
    assert reader.get_field("phi3.rope.dimension_count").contents() == 8
    assert reader.get_field("phi3.rope.scaling.original_context_length").contents() == 64
    model = AutoModelForCausalLM.from_pretrained(base)
    told = reader.get_field("phi3.rope.scaling.attn_factor").contents()
    assert told == pytest.approx(model.model.rotary_emb.attention_scaling) and told > 1
    expected, ids = reference(run, base)
    loaded = AutoModelForCausalLM.from_pretrained(done.path, gguf_file="model.gguf", config=model.config)
    assert (logits(loaded, ids) - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("family", ["gemma", "phi"])
def test_a_file_that_lacks_something_or_holds_too_much_is_not_read_as_a_model(tmp_path, family):
    base = tiny_models.base_model(family, tmp_path / "base")
    model, words = AutoModelForCausalLM.from_pretrained(base), tiny_models.tokenizer()
    write = lambda name: gguf_file.write_gguf(model, words, tmp_path / name, "f16", "x") or tmp_path / name  # noqa: E731
    ids = list(range(5, 105))
    far = lambda other: (logits(other, ids) - logits(model, ids)).abs().max()  # noqa: E731
    rounding = far(read_gguf(write("whole")))
    real = gguf.GGUFWriter.add_rope_freq_base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, base: real(self, base / 100))
        assert far(read_gguf(write("other"))) > 20 * rounding  # a wrong field is another model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_rope_dimension_count", lambda self, count: None)
        with pytest.raises(CheckpointError, match=r"no field rope\.dimension_count"):
            read_gguf(write("field"))
    real_count = gguf.GGUFWriter.add_block_count
    for blocks, words_of_it in ((1, r"no place: blk\.1"), (3, r"no tensor for model\.layers\.2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_block_count", lambda self, _, blocks=blocks: real_count(self, blocks))
            with pytest.raises(CheckpointError, match=words_of_it):
                read_gguf(write("blocks"))


@pytest.mark.parametrize(
    ("model_type", "changed", "words"),
    [
        ("phi", {"qk_layernorm": True}, "norms of queries and keys"),
        ("phi", {"hidden_act": "relu"}, "activation relu"),
        ("gemma", {"hidden_act": "silu"}, "activation silu"),
        ("phimoe", {}, "of type phimoe"),
        ("mixtral", {}, "of type mixtral"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "experts in some layers only"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ],
)
def test_what_cannot_be_read_back_is_refused_by_name_and_told_the_other_way(model_type, changed, words):
    config = AutoConfig.for_model(model_type, **changed)
    with pytest.raises(ConfigError, match=words) as error:
        gguf_file.require_family(config)
    assert "--format merged" in error.value.hint


def test_a_family_or_rotation_that_gguf_is_not_written_for_is_refused_by_name(tmp_path):
    base = tiny_models.base_model("gpt_neox", tmp_path / "base")
    run = tiny_models.finished_run(tmp_path / "run", base)
    with pytest.raises(ConfigError, match="gpt_neox"):
        export_run(run, "gguf")
    assert not (run / "export" / "gguf-f16").exists()
    scaled = AutoModelForCausalLM.from_pretrained(tiny_models.base_model("llama", tmp_path / "llama")).config
    scaled.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match="yarn"):
        gguf_file.require_family(scaled)


def test_an_ollama_export_has_a_modelfile_beside_the_weights(llama, tmp_path):
    done = export_run(llama[0], "ollama", output=tmp_path / "out", quantization="q8_0")
    text = (done.path / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nPARAMETER num_ctx 256\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert (done.path / "model.gguf").is_file()


def test_a_modelfile_of_another_template_leaves_it_to_ollama():
    words = tiny_models.tokenizer()
    for template in (None, "{{ raise_exception('no') }}", tiny_models.CHATML.replace("<|im_end|>", "<|im_end|> ")):
        words.chat_template = template
        text = export.modelfile(words, 256, 512)
        assert "TEMPLATE" not in text
        assert 'PARAMETER stop "<|im_end|>"' in text
    words.eos_token = None
    assert "stop" not in export.modelfile(words, 256, 512)


def test_a_modelfile_keeps_as_much_of_a_conversation_as_the_model_takes_and_its_own_system_words():
    words = tiny_models.tokenizer()
    assert "SYSTEM" not in export.modelfile(words, 256, 8192)
    words.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + tiny_models.CHATML
    )
    text = export.modelfile(words, 256, 8192)
    assert 'SYSTEM """Be kind."""' in text and "TEMPLATE" in text
    for trained, context, kept in ((256, 8192, 4096), (6000, 8192, 6000), (256, 2048, 2048)):
        assert f"PARAMETER num_ctx {kept}\n" in export.modelfile(words, trained, context)


def test_whole_weights_are_copied_and_have_no_adapter(tmp_path, llama):
    run = tiny_models.finished_run(tmp_path / "run", llama[1], method="full")
    done = export_run(run, "merged")
    assert (done.path / "model.safetensors").read_bytes() == (run / "final" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="no adapter"):
        export_run(run, "adapter")
    assert export_run(run, "gguf").max_logit_difference is not None


def test_only_a_finished_run_and_a_free_folder_are_accepted(tmp_path, llama):
    going = write_example_run(tmp_path / "going", finished=False, steps=20)
    with pytest.raises(RunStateError, match="has not finished"):
        export_run(going, "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunStateError, match="exists already"):
        export_run(llama[0], "adapter", output=tmp_path / "out")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, llama, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(RunStateError, match=f"cannot be written: {os.strerror(errno.ENOSPC)}") as caught:
        export_run(llama[0], "adapter", output=tmp_path / "out")
    assert "--output" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_final_model_is_named(tmp_path, llama):
    run = write_example_run(tmp_path / "run", steps=20)
    with pytest.raises(CheckpointError, match=r"final is missing"):
        export_run(run, "adapter")
    broken = tiny_models.finished_run(tmp_path / "broken", llama[1])
    (broken / "final" / "adapter_config.json").write_text("{")
    (broken / "final" / "adapter_model.safetensors").unlink()
    for format in ("adapter", "merged"):
        with pytest.raises(CheckpointError, match="final is damaged") as caught:
            export_run(broken, format)
        assert caught.value.problems == ("adapter_config.json: altered", "adapter_model.safetensors: missing")
        assert not (broken / "export").exists() or not any((broken / "export").iterdir())


def test_without_validation_rows_a_sentence_is_the_probe(tmp_path, llama):
    run = tiny_models.finished_run(tmp_path / "run", llama[1])
    (run / "splits" / "validation.parquet").unlink()
    assert export_run(run, "merged").max_logit_difference is not None


def test_the_model_card_tells_scores_data_settings_and_how_to_load(llama, tmp_path):
    card = (export_run(llama[0], "merged", output=tmp_path / "out").path / "README.md").read_text()
    for part in ("| base | 2.3100 (2.2400 to 2.3900)", "| tuned | 1.1600", "opened 2 times", "SHA-256", "rank: 8",
                 "pipeline(", "licence of the base is not known"):  # fmt: skip
        assert part in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder of this machine is no name for others


def test_the_licence_is_read_from_the_base_folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert model_card.base_license(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("no metadata")
    assert model_card.base_license(str(tmp_path)) is None
    assert model_card.base_license("owner/absent") is None


def test_a_card_of_a_run_without_records_says_so(tmp_path):
    run = write_example_run(tmp_path / "run", steps=20, evaluated=False)
    for name in ("profile", "plan"):
        (run / "records" / f"{name}.json").unlink()
    card = model_card.model_card(export.load_run_data(run), "gguf", "owner/base", "q8_0")
    assert "Not scored." in card
    assert card.count("Not recorded.") == 2


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for repository, words in (("owner/name", "nobody is logged in"), ("a name/with spaces", "--push")):
        with pytest.raises(ConfigError, match=words):
            export_run(llama[0], "adapter", output=tmp_path / "out", push=repository)
    assert list(tmp_path.iterdir()) == []


def test_a_push_that_fails_says_that_the_export_is_complete(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(LarasError, match="is complete, but cannot be pushed"):  # the tests have no network
        export_run(llama[0], "adapter", output=tmp_path / "out", push="owner/name")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def sentencepiece_like():
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(tiny_models.TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special + alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_scores_of_a_sentencepiece_vocabulary_fall_in_the_order_of_the_merges():
    fields = gguf_tokenizer(sentencepiece_like(), 450)
    assert fields.kind == "llama"
    place = {token: index for index, token in enumerate(fields.tokens)}
    ranks = [fields.scores[place[pair.replace(" ", "", 1)]] for pair in fields.merges]
    assert ranks == sorted(ranks, reverse=True)
    assert fields.types[place["<unk>"]] == gguf.TokenType.UNKNOWN
    assert fields.types[449] == gguf.TokenType.UNUSED


def test_a_file_says_whether_a_space_goes_before_a_text(tmp_path):
    words = sentencepiece_like()
    for prefixed in (False, True):
        if prefixed:
            words.backend_tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        writer = gguf.GGUFWriter(tmp_path / "file", "llama")
        write_tokenizer(writer, words, 450)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        field = gguf.GGUFReader(tmp_path / "file").get_field("tokenizer.ggml.add_space_prefix")
        assert field.contents() == prefixed


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {"type": "ByteLevel", "use_regex": True}]}, "smollm"),
    ],
)  # fmt: skip
def test_word_splitting_is_named_as_llama_cpp_names_it(state, name):
    from laras.reporting.gguf_tokenizer import _pre_tokenizer_name

    assert _pre_tokenizer_name(state) == name
    tail = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    head = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    for numbers, expected in ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")):
        split = {"type": "Split", "pattern": {"Regex": head + numbers + tail}}
        assert _pre_tokenizer_name({"type": "Sequence", "pretokenizers": [split]}) == expected
    with pytest.raises(ConfigError, match="no known name"):
        _pre_tokenizer_name({"type": "Whitespace"})


def test_a_tokenizer_that_is_not_bpe_is_refused():
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match="WordLevel"):
        gguf_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 1)


def test_the_run_configuration_of_the_fixture_is_real(llama):
    assert export.load_run_data(llama[0]).config == RunConfig(
        run_name="run", model_name_or_path=str(llama[1]), max_length=256
    )
