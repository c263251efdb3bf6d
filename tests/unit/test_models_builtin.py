"""The built-in model comes out of its package whole, with the tokens it was trained with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import platformdirs
import pytest
from transformers import AutoConfig, AutoTokenizer

from laras.errors import ConfigError
from laras.models import builtin
from laras.models.loader import load_model, load_tokenizer

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(builtin.PACKAGE) is None, reason=f"{builtin.PACKAGE} is not installed"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path_factory.mktemp("cache")))
        yield Path(builtin.builtin_tokenizer_dir())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    return tmp_path


@needs_package
def test_turns_end_with_the_token_that_stops_generation(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    config = AutoConfig.from_pretrained(tokenizer_dir)
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id
    assert config.architectures == ["LlamaForCausalLM"]


@needs_package
def test_the_tokenizer_gives_back_the_text(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for text in ["def f(x):\n    return  x + 1 , 'a' ?\n", "héllo  wörld 12345 ."]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_package
def test_the_chat_template_renders_turns(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_without_the_package_the_hub_is_named(monkeypatch):
    monkeypatch.setattr(builtin, "PACKAGE", "laras_no_such_package")
    assert builtin.resolve_tokenizer("builtin:smollm2-135m") == builtin.HUB_ID
    assert builtin.resolve_model("builtin:smollm2-135m") == builtin.HUB_ID


def test_other_sources_are_left_alone_and_other_builtins_refused():
    assert builtin.resolve_model("org/model") == builtin.resolve_tokenizer("org/model") == "org/model"
    with pytest.raises(ConfigError, match="builtin:nothing"):
        builtin.resolve_model("builtin:nothing")


@pytest.fixture
def package_with_gguf(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("site") / "laras_gguf_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (folder / "weights.gguf").write_bytes(b"not a model")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(builtin, "PACKAGE", folder.name)
    return folder / "weights.gguf"


def test_an_interrupted_write_leaves_nothing_and_the_next_one_completes(cache, package_with_gguf):
    def write_half(gguf, folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    def write_all(gguf, folder):
        (folder / "whole").write_text(gguf.name)

    with pytest.raises(KeyboardInterrupt):
        builtin._cached("model", write_half)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    folder = Path(builtin._cached("model", write_all))
    assert [path.name for path in folder.iterdir()] == ["whole"]
    # What is there is used as it is.
    assert builtin._cached("model", write_half) == str(folder)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, package_with_gguf):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="cannot be unpacked") as caught:
        builtin.builtin_tokenizer_dir()
    assert "XDG_CACHE_HOME" in str(caught.value)


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "model"
    builtin._write_whole(folder, lambda aside: (aside / "first").touch())
    builtin._write_whole(folder, lambda aside: (aside / "second").touch())
    assert [path.name for path in folder.iterdir()] == ["first"]


@pytest.mark.slow
@needs_package
def test_the_unpacked_model_knows_english(cache):
    model = load_model("builtin:smollm2-135m", precision="fp32")
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer_ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer_ids)
    assert answer_ids[-1] == tokenizer.eos_token_id
    assert not list(cache.glob("*.part"))
