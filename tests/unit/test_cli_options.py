"""The command line's words: one configuration file, and overrides in three spellings."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from laras.cli.main import app
from laras.cli.options import print_json, read_config, split_arguments
from laras.cli.sweep import sweep_command
from laras.errors import ConfigError


@pytest.mark.parametrize(
    "words",
    [["learning_rate=1e-4"], ["--learning-rate", "1e-4"], ["--learning_rate=1e-4"], ["--learning-rate=1e-4"]],
)
def test_an_override_means_the_same_in_every_spelling(words: list[str]) -> None:
    config, given = read_config(words)
    assert config.learning_rate == 1e-4
    assert given is None


def test_a_file_may_stand_before_between_and_after_overrides(tmp_path: Path) -> None:
    path = tmp_path / "laras.yaml"
    path.write_text("seed: 7\n", encoding="utf-8")
    for words in (
        [str(path), "lora_r=4", "--limit", "5"],
        ["lora_r=4", str(path), "--limit=5"],
        ["--limit", "5", "lora_r=4", str(path)],
    ):
        config, given = read_config(words)
        assert (config.seed, config.lora_r, config.limit, given) == (7, 4, 5, "seed: 7\n")


def test_an_option_without_a_value_is_true_and_does_not_swallow_the_file(tmp_path: Path) -> None:
    assert split_arguments(["--use-dora", "laras.yaml"]) == (Path("laras.yaml"), ["use-dora=true"])
    assert split_arguments(["--use-dora", "--limit", "3"]) == (None, ["use-dora=true", "limit=3"])


def test_two_files_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml, b\.yaml"):
        split_arguments(["a.yaml", "b.yaml"])


def test_every_problem_of_the_command_line_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(["--learning-rat", "1", "seed=-1"])
    assert "did you mean 'learning_rate'" in str(caught.value)
    assert "seed" in str(caught.value)


def test_json_is_one_object_and_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "pair": (float("inf"), 1.5), "text": "é"})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "pair": [None, 1.5], "text": "é"}


def test_a_search_written_as_a_value_is_told_the_option() -> None:
    with pytest.raises(ConfigError, match="what to search") as caught:
        sweep_command(["learning_rate=1e-5..1e-3:log", "--lora-r", "4,8", "weight_decay=0.1", "report_to=[]"])
    assert caught.value.hint == "write --search learning_rate=1e-5..1e-3:log --search lora_r=4,8"


VERBS: Any = get_command(app)


@pytest.mark.parametrize("verb", ["", *VERBS.commands])
def test_help_fits_80_columns_and_asks_for_no_value_where_none_is_taken(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    assert "<bool>" not in shown and "bool" not in shown
    if not verb:  # a line for each verb, in the order of use
        panels = [shown.index(title) for title in ("Before training", "Training", "After training")]
        places = [shown.index(f"│ {name} ") for name in VERBS.commands]
        assert places == sorted(places) and panels == sorted(panels)


@pytest.mark.parametrize(
    "example", [line for verb in VERBS.commands.values() for line in (verb.epilog or "").splitlines()[1:]]
)
def test_every_example_of_help_is_understood_by_its_verb(example: str) -> None:
    program, verb, *words = shlex.split(example)
    assert program == "laras"
    values = VERBS.commands[verb].make_context(verb, words).params
    if "arguments" in values:
        config, _ = read_config([word for word in values["arguments"] if word != "laras.yaml"])
        assert config is not None


@pytest.mark.parametrize("shell", ["zsh", "fish"])  # bash: tests/e2e/test_cli.py
def test_shells_complete_verbs_options_and_cards(shell: str) -> None:
    def completed(words: str) -> str:
        asked = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env = os.environ | asked | {"_LARAS_COMPLETE": f"complete_{shell}"}
        code = "import sys; sys.argv = ['laras']\nfrom laras.cli.main import main\nmain()"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False).stdout

    assert "export" in completed("laras ex")
    assert "--format" in completed("laras export runs/one --fo")
    assert "rtx4090" in completed("laras plan --gpu rtx4")


@pytest.mark.parametrize(("name", "words"), [("", "no GPU ''"), ("4090", "no GPU '4090'"), ("null", "no GPU 'null'")])
def test_whatever_is_given_as_a_card_is_taken_for_its_name(name: str, words: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", f"model_name_or_path={tmp_path}", "--gpu", name])
    assert words in str(result.exception)
