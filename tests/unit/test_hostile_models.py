"""A model folder written by an attacker runs no code and ends in a ConfigError or DataError."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from laras.config import RunConfig
from laras.data import render
from laras.data.render import build_renderer
from laras.errors import ConfigError, DataError, ExitCode
from laras.models.loader import load_model, load_model_config, load_tokenizer
from laras.pipeline import plan
from laras.planning.architecture import load_model_spec
from tiny_models import CHATML, base_model, tokenizer

EVIL = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    "from transformers import LlamaConfig, LlamaForCausalLM\n"
    "class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): pass\nclass T: pass\n"
)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model("llama", tmp_path_factory.mktemp("models") / "honest")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return shutil.copytree(honest, tmp_path / "model")


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def model(folder: Path) -> Any:
    return load_model(str(folder), precision="fp32")


def refused(work: Callable[[Path], Any], folder: Path, text: str = ".") -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        work(folder)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint


def test_code_in_a_model_folder_does_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL, encoding="utf-8")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    changed(folder / "config.json", auto_map=code)
    assert type(model(folder)).__module__.startswith("transformers.")  # a known type never needs the code
    changed(folder / "config.json", auto_map=code, model_type="own_type")
    changed(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="OwnTokenizer")
    refused(model, folder, "trust_remote_code is false")
    refused(lambda path: load_model_config(str(path)), folder, "trust_remote_code is false")
    refused(lambda path: load_tokenizer(str(path)), folder, "trust_remote_code is false")
    assert not (folder / "ran").exists()


def test_pickles_are_not_read_under_any_name(folder: Path) -> None:
    weights, evil = folder / "model.safetensors", Touch(folder / "ran")
    weights.write_bytes(pickle.dumps(evil))
    refused(model, folder, "SafetensorError")
    torch.save({"a": evil}, weights)
    refused(model, folder, "SafetensorError")
    weights.unlink()
    torch.save({"a": evil}, folder / "pytorch_model.bin")
    refused(model, folder, "safetensors")
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(model, folder)
    assert not (folder / "ran").exists()


def test_a_lying_safetensors_header_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    name = next(key for key in header if key != "__metadata__")

    def packed(changed_header: dict[str, Any]) -> bytes:
        text = json.dumps(changed_header).encode()
        return struct.pack("<Q", len(text)) + text + body

    hostile = {
        "huge header": struct.pack("<Q", 2**63) + whole[8:],
        "long header": struct.pack("<Q", 10**8) + whole[8:],
        "no header": struct.pack("<Q", 4) + b"{{{{" + body,
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "huge tensor": packed(
            {**header, name: {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
        ),
        "other shapes": packed(
            {k: v if k == "__metadata__" else {**v, "shape": v["shape"][::-1]} for k, v in header.items()}
        ),
    }
    for content in hostile.values():
        weights.write_bytes(content)
        refused(model, folder)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(model, folder, "lack .* tensors")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage", b"[]", b"[" * 100_000, b"", b"null", b'{"model": 5}'])
def test_a_garbage_tokenizer_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        load_tokenizer(str(folder))
    except ConfigError as error:
        assert error.hint
    else:
        assert name == "tokenizer_config.json"  # which may be all defaults


HOSTILE_CONFIGS: dict[str, dict[str, Any]] = {
    "vocabulary": {"vocab_size": 10**12},
    "layers": {"num_hidden_layers": 10**9},
    "beyond floats": {"vocab_size": 10**400, "hidden_size": 10**400},
    "positions": {"max_position_embeddings": 10**15},
    "experts": {"num_local_experts": 10**9},
    "float": {"hidden_size": 1e300},
    "negative": {"hidden_size": -1},
    "list": {"num_hidden_layers": [1]},
    "type": {"model_type": ["x"]},
    "architectures": {"architectures": 5},
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_plan_for_impossible_sizes_is_refused(folder: Path, name: str) -> None:
    changed(folder / "config.json", **HOSTILE_CONFIGS[name])
    refused(lambda path: load_model_spec(path), folder)
    wanted = RunConfig(model_name_or_path=str(folder / "config.json"), gpu="t4")
    refused(lambda _: plan(wanted), folder)


@pytest.mark.parametrize(
    "values",
    [{"quantization_config": "x"}, {"dtype": "os.system"}, {"hidden_act": "evil"}, {"tie_word_embeddings": "x"}],
)
def test_a_configuration_that_transformers_trips_over_is_refused(folder: Path, values: dict[str, Any]) -> None:
    changed(folder / "config.json", **values)
    refused(model, folder)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[]", b'{"vocab_size":' + b"9" * 5000 + b"}", b""])
def test_a_configuration_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(lambda path: load_model_spec(path), folder)
    refused(lambda path: load_model_config(str(path)), folder)


@pytest.mark.parametrize("source", ["a\0b", "\ud800", "../../etc/passwd", "a" * 5000, "-x", ".."])
def test_an_impossible_model_name_is_refused(source: str, tmp_path: Path) -> None:
    refused(lambda _: load_tokenizer(source), tmp_path)
    refused(lambda _: load_model_spec(source), tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% set _ = messages.clear() %}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in [[1, 2]] recursive %}{{ loop([i, i]) }}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 1|round(1000000000, 'ceil') }}",
        "{{ lipsum(n=100000000) }}",
        "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
        "{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}",
        "{% set a = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = dict(b=a.x, c=a.x) %}{% endfor %}{{ a.x }}",
        "{% set a = namespace(x=[[1]]) %}{% for i in range(60) %}{% set a.x = a.x + a.x %}{% endfor %}{{ a.x }}",
        "{% set a = namespace(x=[1]) %}{% for i in range(9) %}{% set a.x = [a.x] * 1000 %}{% endfor %}{{ a.x|tojson }}",
        "{{ 'a'|center(10000000000) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10000000000) }}",
        "{{ messages[0].content.ljust(10000000000) }}",
        "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ [0] * 10000000000 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ 2.0 ** 5000 }}",
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{% for",
        "{{ raise_exception('no') }}",
        "{{ nope.a.b }}",
        "{{ '\\ud800' }}",
        "{% continue %}",
    ],
)
def test_a_hostile_chat_template_stays_in_its_sandbox(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, less in (("MAX_TIME_S", 0.3), ("MAX_STEPS", 100_000), ("MAX_PARTS", 20_000)):  # for a quick test
        monkeypatch.setattr(f"laras.data.template.{name}", less)
    words = tokenizer()
    words.chat_template = template + CHATML
    with pytest.raises(DataError) as caught:
        build_renderer(words, "messages", True)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bound on memory is the kernel's of Linux")
@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('0', ns.x) %}"
        "{% endfor %}",
        "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(x='0123456789') %}"
        "{% for i in range(60) %}{% set ns.x = d(ns.x) %}{% endfor %}",
    ],
)
def test_a_template_that_wants_all_memory_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_DECODED_BYTES", 2**27)
    words = tokenizer()
    words.chat_template = template + CHATML
    with pytest.raises(DataError) as caught:
        build_renderer(words, "messages", True)
    assert caught.value.hint


def test_a_template_that_is_slow_for_one_conversation_costs_that_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    slow = "{% if messages[0].content == 'slow' %}{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}"
    words.chat_template = slow + "{% endfor %}{% endif %}" + CHATML
    renderer = build_renderer(words, "messages", True)
    one, two = renderer.encode(
        [{"messages": MESSAGES}, {"messages": [{**MESSAGES[0], "content": "slow"}, MESSAGES[1]]}]
    )
    assert one.text
    assert "more than 1,000,000 steps for one conversation" in two.reason
    monkeypatch.setattr("laras.data.template.MAX_TIME_S", 0.01)
    monkeypatch.setattr("laras.data.template.MAX_STEPS", 10**9)
    (late,) = renderer.encode([{"messages": [{**MESSAGES[0], "content": "slow"}, MESSAGES[1]]}])
    assert "more than 0.01 s for one conversation" in late.reason


def test_what_templates_of_models_do_is_within_the_bounds() -> None:
    words = tokenizer()
    words.chat_template = (
        "{% set ns = namespace(last=0, seen=[], text='') %}{% for m in messages %}{% set ns.last = loop.index0 %}"
        "{% set ns.seen = ns.seen + [m.role] %}{% set ns.text = ns.text ~ m.content[:1] %}{% endfor %}"
        "{% macro turn(m, first) %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>' }}\n{% endmacro %}"
        "{% for m in messages %}{{ turn(m, loop.first) }}{% if loop.last and loop.length % 2 %}{% endif %}{% endfor %}"
    )
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n} " * 9} for n in range(60)]
    (encoded,) = build_renderer(words, "messages", True).encode([{"messages": turns}])
    assert encoded.text == words.apply_chat_template(turns, tokenize=False)
    assert sum(label != -100 for label in encoded.labels) > 500


def test_a_template_that_looks_at_the_objects_sees_nothing_of_python() -> None:
    words = tokenizer()
    words.chat_template = CHATML + "{{ messages|attr('__class__') }}{{ '{0.__class__}'.format(messages) }}"
    (encoded,) = build_renderer(words, "messages", True).encode([{"messages": MESSAGES}])
    assert "class" not in encoded.text
