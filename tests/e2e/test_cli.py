"""The command line as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laras.config import RunConfig
from laras.config_file import load_config
from laras.planning.catalogue import find_gpu


def laras(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from laras.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_init_writes_a_configuration_that_loads_as_the_builtin_example(tmp_path: Path) -> None:
    done = laras("init", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "wrote laras.yaml\n")
    assert load_config(tmp_path / "laras.yaml") == RunConfig()


def test_init_replaces_a_file_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "laras.yaml").write_text("mine")
    refused = laras("init", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: laras.yaml exists\nhint: name another file, or replace it with --force\n"
    assert (tmp_path / "laras.yaml").read_text() == "mine"
    assert laras("init", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "laras.yaml").read_text() != "mine"


def test_init_names_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refused = laras("init", "absent/laras.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "cannot write absent/laras.yaml" in refused.stderr


def test_version_and_help_answer_without_importing_torch(tmp_path: Path) -> None:
    assert laras("--version", cwd=tmp_path).stdout.startswith("laras ")
    code = "import sys; sys.argv = ['laras', '--help']\nfrom laras.cli.main import main\ntry: main()\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("laras re", {"resume", "report"}),
        ("laras export --format g", {"gguf"}),
        ("laras export --qua", {"--quantization"}),
        ("laras plan --gpu a100", {"a100-40gb", "a100-80gb"}),
        ("laras test some", {""}),  # a folder is the shell's own to complete
    ],
)
def test_the_shell_completes_verbs_options_and_their_values(line: str, offered: set[str]) -> None:
    asked = {"_LARAS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [str(Path(sys.executable).with_name("laras"))]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert set(done.stdout.rstrip("\n").split("\n")) == offered
    for name in offered - {"", "resume", "report", "gguf", "--quantization"}:
        assert find_gpu(name)
