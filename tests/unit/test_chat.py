"""`laras chat` as a person and as a program use it."""

from __future__ import annotations

import io
import json
import re
import shutil
from functools import partial

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import tiny_models
from laras.cli import chat as chat_module
from laras.cli.chat import chat_command
from laras.cli.export import export_command
from laras.config_file import config_to_yaml
from laras.errors import CheckpointError, ConfigError
from laras.evaluation.generate import GenerationSettings
from laras.rundir import RunDir

app = typer.Typer()
app.command("chat")(chat_command)
app.command("export")(export_command)
OPTIONS = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny_models.finished_run(folder / "run", tiny_models.base_model("llama", folder / "base"))


def chat(run, *arguments, text=None):
    return CliRunner().invoke(app, ["chat", str(run), *OPTIONS, *arguments], input=text, catch_exceptions=False)


def test_one_prompt_gives_one_answer_that_a_program_can_read(run):
    both = json.loads(chat(run, "--prompt", "sea", "--compare", "--json").stdout)
    assert both["prompt"] == "sea"
    assert set(both["answers"]) == {"base", "tuned"}
    assert set(both["answers"]["tuned"]) == {"text", "tokens", "stopped"}
    assert both["answers"]["tuned"]["text"] != both["answers"]["base"]["text"]
    tuned = json.loads(chat(run, "--prompt", "sea", "--json").stdout)["answers"]
    assert tuned == {"tuned": both["answers"]["tuned"]}
    assert chat(run, "--prompt", "sea", "--base").stdout.strip() == both["answers"]["base"]["text"]


def test_what_a_library_prints_while_it_loads_stays_off_standard_output(run, monkeypatch):
    real = chat_module._load
    monkeypatch.setattr(chat_module, "_load", lambda path: print("a greeting") or real(path))
    done = chat(run, "--prompt", "sea", "--json")
    assert set(json.loads(done.stdout)) == {"run_dir", "prompt", "answers"}
    assert "a greeting" in done.stderr


def test_a_conversation_switches_models_remembers_and_forgets(run):
    done = chat(
        run, "--system", "be brief", text="sea\n\n/base\nsea\n/compare\n/help\nsun\n/reset\n/tuned\nsea\n/quit\nnever\n"
    )
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    for text in (
        "now answering: base",
        "now answering: base and tuned",
        "starts anew",
        "now answering: tuned",
        "/quit: end",
    ):
        assert text in done.stderr
    assert (lines.count("[base]"), lines.count("[tuned]")) == (1, 1)
    first, last = lines[0], done.stdout.rstrip("\n").splitlines()[-1]
    assert first.strip()[:4] == last.strip()[:4]  # forgotten: the same question is answered as at first


def test_a_conversation_that_fills_the_context_says_so_and_goes_on(run):
    done = chat(run, text="sea " * 300 + "\nsea\n")
    assert "context is full" in done.stderr
    assert done.exit_code == 0


def test_two_answers_stand_in_columns_beside_which_the_terminal_can_write_its_own_ctrl_c(run, monkeypatch):
    screen = io.StringIO()
    console = partial(Console, file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr("rich.console.Console", console)
    both = chat_module._Chat(chat_module._load(run), GenerationSettings(30, 0), None, ("base", "tuned"))
    chat_module._show_columns(both, "sea")
    lines = re.sub(r"\x1b\[[?\d;]*\w", "\n", screen.getvalue()).splitlines()
    assert any("[base]" in line and "[tuned]" in line for line in lines)
    assert 60 < max(map(len, lines)) <= 77


def test_a_configuration_that_names_another_model_is_refused_by_name(run, tmp_path):
    other = tiny_models.base_model("llama", tmp_path / "other", hidden_size=32)
    copy = RunDir(shutil.copytree(run, tmp_path / "run"))
    config = copy.load_config().model_copy(update={"model_name_or_path": str(other)})
    copy.config.write_text(config_to_yaml(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"is not one for {other}"):
        chat(copy.path, "--prompt", "sea")


def test_json_without_a_prompt_is_refused(run):
    with pytest.raises(ConfigError, match="--json needs --prompt"):
        chat(run, "--json")


def test_the_export_command_prints_the_folder_and_the_checked_difference(run, tmp_path):
    arguments = ["export", str(run), "--format", "merged", "--output", str(tmp_path / "a")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.stdout == f"{tmp_path / 'a'}\n"
    assert "greatest difference of a logit" in done.stderr
    done = CliRunner().invoke(app, ["export", str(run), "-o", str(tmp_path / "b"), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout) == {
        "path": str(tmp_path / "b"), "format": "adapter", "max_logit_difference": None, "tolerance": None, "url": None,
        "compared_with": "the adapter model", "rounding_logit_difference": None,
    }  # fmt: skip
    assert (
        CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "c")]).output == f"{tmp_path / 'c'}\n"
    )
