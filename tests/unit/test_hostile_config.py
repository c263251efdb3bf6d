"""A configuration written by an attacker is refused, quickly and with a hint; nothing of it runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from laras.config_file import load_config
from laras.errors import ConfigError, ExitCode
from laras.rundir import RunDir, create_run_dir


def bomb(use: str) -> str:
    """Nine times nine times ... nine values: a billion of them in 500 bytes."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]" for before, here in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    return "\n".join([*lines, use, ""])


HOSTILE = {
    "python-call": "model_name_or_path: !!python/object/apply:os.system ['touch {folder}/ran']\n",
    "python-name": "seed: !!python/name:os.system\n",
    "document-tag": "!!python/object/new:os.system ['touch {folder}/ran']\n",
    "own-tag": "seed: !evil 1\n",
    "alias-bomb": bomb("columns: *i"),
    "alias-bomb-in-union": bomb("dataset: {train: *i}"),
    "merge-bomb": "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\n",
    "endless-list": "dataset: {train: &a [*a]}\n",
    "endless-mapping": "split: &a {train: *a}\n",
    "huge-decimal": "seed: " + "9" * 5000 + "\n",
    "huge-hexadecimal": "max_steps: 0x" + "f" * 5000 + "\n",
    "huge-sexagesimal": "seed: " + ":".join(["59"] * 3000) + "\n",
    "large-integer": "effective_batch_size: " + "9" * 400 + "\n",
    "large-float": "num_train_epochs: 1.0e+308\n",
    "deep-list": "dataset: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep-mapping": "columns: " + "{{a: " * 150 + "1" + "}}" * 150 + "\n",
    "nan": "learning_rate: .nan\n",
    "inf": "num_train_epochs: .inf\n",
    "long-name": "model_name_or_path: " + "a" * 1_000_000 + "\n",
    "long-key": "? " + "a" * 1_000_000 + "\n: 1\n",
    "long-file": "#" * (2**20 + 1),
    "many-keys": "".join(f"k{number}: 1\n" for number in range(20_000)),
    "number-as-key": "1: 2\n",
    "null-as-key": "null: 1\n",
    "list-as-key": "? [a, b]\n: 1\n",
    "number-as-inner-key": "split: {{1: 2}}\n",
    "null-byte": 'dataset: "a\\0b"\n',
    "null-byte-in-output": 'output_dir: "a\\0b"\n',
    "raw-null-byte": "seed: \0\n",
    "half-character": 'dataset: "\\ud800"\n',
    "impossible-character": 'seed: "\\UFFFFFFFF"\n',
    "binary": "model_name_or_path: !!binary aGk=\n",
    "no-boolean": "seed: !!bool abc\n",
    "no-time": "seed: !!timestamp abc\n",
    "no-integer": "seed: !!int ''\n",
    "no-mapping": "split: !!map [1]\n",
    "list-as-bits": "quantization_bit: []\n",
    "profile-elsewhere": "profile: ../../../etc/passwd\n",
    "kernel-of-the-hub": "attn_implementation: somebody/kernel\n",
    "name-up": "run_name: ../../x\n",
    "name-dots": "run_name: ..\n",
    "name-absolute": "run_name: /tmp/x\n",
    "name-below": "run_name: a/b\n",
    "name-with-line-end": 'run_name: "ok\\n"\n',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_at_once_and_nothing_of_it_runs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "laras.yaml"
    text = HOSTILE[name].replace("{folder}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
    path.write_text(text, encoding="utf-8")
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - begin < 5
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint
    assert len(str(caught.value)) < 5_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["laras.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "seed=!!python/object/apply:os.system ['true']",
        "seed=2020-99-99",
        "seed=!!int ''",
        "dataset=" + "[" * 5000,
        "seed=" + "9" * 5000,
        "split=&a {train: *a}",
        "run_name=../x",
        "=1",
        "." * 10_000 + "=1",
        "\ud800=1",
        "output_dir=" + "a" * 5000,
    ],
)
def test_a_hostile_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.hint


@pytest.mark.parametrize("name", ["/dev/zero", "a\0b", "a" * 5000])
def test_what_is_no_configuration_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert caught.value.hint


def test_an_alias_of_a_plain_value_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "laras.yaml"
    path.write_text("model_name_or_path: &name some/model\ndataset: *name\n", encoding="utf-8")
    assert load_config(path).dataset == "some/model"


def test_a_model_name_never_leads_out_of_the_output_folder(tmp_path: Path) -> None:
    for name in ("../../../etc", "..", "a/../..", "builtin:..\\..", "....//", "x\n../y", "\u202e/../z", "-"):
        run = create_run_dir(load_config(None, {"model_name_or_path": name, "output_dir": str(tmp_path / "runs")}))
        assert isinstance(run, RunDir)
        assert run.path.resolve().parent == (tmp_path / "runs").resolve()
        assert "\n" not in run.path.name
