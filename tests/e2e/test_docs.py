"""What the documentation shows runs, what it configures is valid, and where it links there is something.

Blocks of one page run in order in a folder of their own. They are changed as little as possible:

- the model is a tiny one, in place of the Hub's and of the built-in one, and `builtin:stdlib` is a small file;
- RUN is a finished run (the newest of the page, else a shared one), SWEEP the newest of the page, INTERRUPTED a run
  that was stopped;
- `laras` lines run in this process, which loads the libraries once;
- configurations get the keys of QUICK, and answers are short (ADDED).

A block whose first line is `# not run in tests: REASON` is left out; of a README it is the lines named in LEFT_OUT.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import laras
from laras.cli.main import app
from laras.config_file import load_config
from laras.data.formats import detect_layout, normalize_row
from laras.errors import TrainingInterrupted
from tiny_models import base_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind"]
HUB_MODELS = ("Qwen/Qwen2.5-1.5B-Instruct",)
NOT_RUN = "# not run in tests: "
LEFT_OUT = {"make ": "creates a virtual environment from the network"}
QUICK = "max_steps: 3\nper_device_train_batch_size: 8\n"
ADDED = {"chat": ["--max-new-tokens", "8"], "test": ["--answers", "1"], "sweep": ["--trials", "1"]}
GENERATED = {"reference/config.md", "reference/cli.md"}
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    language: str
    title: str | None
    text: str


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("README*.md"))]


def blocks_of(page: Path) -> list[Block]:
    found = []
    for language, info, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', info)
        found.append(Block(language, title[1] if title else None, text))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PAGES_THAT_RUN = [
    page
    for page in pages()
    if page.name != "README.id.md"  # its commands are those of README.md, which a test below says
    and any(block.language in ("sh", "python") for block in blocks_of(page))
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """One file for each format that the documentation speaks of; all rows differ."""
    said = [f"what is {WORDS[n % 12]} number {n} for a {WORDS[n // 12]}" for n in range(72)]
    told = [f"a {WORDS[n % 12]} is what {WORDS[n // 12]} does, {n} times over" for n in range(72)]
    pairs = list(zip(said, told, strict=True))
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    write_rows(folder / "chats.jsonl", chats[:60])
    write_rows(folder / "exam.jsonl", chats[60:])
    write_rows(folder / "alpaca.jsonl", [{"instruction": q, "input": "", "output": a} for q, a in pairs])
    write_rows(folder / "pairs.jsonl", [{"question": q, "answer": a} for q, a in pairs])
    write_rows(folder / "text.jsonl", [{"text": f"{q}, {a}"} for q, a in pairs])


class _StopAfter(laras.Observer):
    def step_finished(self, report: Any) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Workplace(NamedTuple):
    folder: Path
    model: Path
    finished: Path
    interrupted: Path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("docs")
    model = base_model("llama", folder / "model")
    write_data(folder)
    settings: dict[str, Any] = {"model_name_or_path": str(model), "dataset": str(folder / "chats.jsonl")}
    settings |= {"output_dir": str(folder / "runs"), "report_to": [], "max_steps": 3, "per_device_train_batch_size": 8}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        finished = laras.train(settings, run_name="finished").run_dir
        gc.collect()
        gc.freeze()  # what the libraries hold is not looked through again at every run
        with pytest.raises(TrainingInterrupted):
            laras.train(settings, run_name="interrupted", observer=_StopAfter())
        yield Workplace(folder, model, finished, folder / "runs" / "interrupted")
    torch.set_num_threads(threads)


def substituted(text: str, place: Workplace) -> str:
    for name in (*HUB_MODELS, "builtin:smollm2-135m"):
        text = text.replace(name, str(place.model))
    return text.replace("builtin:stdlib", "chats.jsonl") + QUICK


def run_line(line: str, place: Workplace) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    own = sorted(Path("runs").glob("*"), key=lambda path: path.stat().st_mtime) if Path("runs").is_dir() else []
    newest = str(own[-1] if own else place.finished)
    names = {"RUN": newest, "SWEEP": newest, "INTERRUPTED": str(place.interrupted)}
    words = [names.get(word, word) for word in words]
    assert words[0] == "laras", f"only laras is run here: {line}"
    done = CliRunner().invoke(app, [*words[1:], *ADDED.get(words[1], [])], catch_exceptions=False)
    assert done.exit_code == 0, f"{line}\n{done.output}"
    if words[1] == "init":
        path = Path("laras.yaml")
        path.write_text(substituted(path.read_text(encoding="utf-8"), place), encoding="utf-8")


def reason_not_to_run(block: Block, page: Path) -> str | None:
    first = block.text.splitlines()[0]
    if first.startswith(NOT_RUN):
        return first.removeprefix(NOT_RUN)
    if page.parent == ROOT:
        return next((why for start, why in LEFT_OUT.items() if first.startswith(start)), None)
    return None


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=name_of)
def test_every_shell_and_python_block_runs_or_says_why_not(
    page: Path, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in workplace.folder.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(page)
    if not any("laras init" in block.text for block in blocks):
        text = substituted("model_name_or_path: builtin:smollm2-135m\ndataset: builtin:stdlib\n", workplace)
        Path("laras.yaml").write_text(text, encoding="utf-8")
    ran = 0
    for block in blocks:
        if block.language == "yaml" and block.title:
            Path(block.title).write_text(substituted(block.text, workplace), encoding="utf-8")
        if block.language not in ("sh", "python"):
            continue
        why_not = reason_not_to_run(block, page)
        if why_not is not None:
            assert len(why_not) > 5, "a reason is given"
            continue
        ran += 1
        if block.language == "python":
            exec(compile(block.text, f"{name_of(page)}, python block", "exec"), {"__name__": "docs"})
        else:
            for line in block.text.splitlines():
                run_line(line, workplace)
    assert ran or all(reason_not_to_run(block, page) for block in blocks if block.language in ("sh", "python"))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_configuration_shown_is_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks_of(page)):
        if block.language == "yaml":
            path = tmp_path / f"{number}.yaml"
            path.write_text(block.text, encoding="utf-8")
            load_config(path)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_row_shown_is_one_that_is_accepted(page: Path) -> None:
    for block in blocks_of(page):
        for line in block.text.splitlines() if block.language == "json" else ():
            row = json.loads(line)
            example = normalize_row(row, detect_layout(row))
            assert not isinstance(example, str), example


def anchors_of(page: Path) -> set[str]:
    """Names of the headings, as GitHub and the site both make them for plain words."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_internal_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    missing = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if path.is_relative_to(DOCS) and path.relative_to(DOCS).as_posix() in GENERATED:
            continue
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            missing.append(target)
    assert missing == []


def test_the_generated_reference_names_every_key_and_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.main import get_command

    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    import hooks  # type: ignore[import-not-found]

    config, cli = hooks.config_page(), hooks.cli_page()
    assert [key for key in laras.RunConfig.model_fields if f"| `{key}` |" not in config] == []
    group: Any = get_command(app)
    assert [verb for verb in group.commands if f"## laras {verb}\n" not in cli] == []


def test_the_readmes_show_the_same_commands() -> None:
    def commands(name: str) -> list[list[str]]:
        blocks = [block.text for block in blocks_of(ROOT / name) if block.language == "sh"]
        return [shlex.split(line, comments=True) for text in blocks for line in text.splitlines()]

    assert commands("README.id.md") == commands("README.md")


def test_the_readmes_give_the_same_figures() -> None:
    def figures(name: str, title: str) -> list[str]:
        section = (ROOT / name).read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
        return sorted(re.sub("[.,]", "", number) for number in re.findall(r"\d[\d.,]*\d|\d", section))

    assert figures("README.id.md", "Hasil pengukuran") == figures("README.md", "Measured") != []
    assert figures("README.id.md", "Dua perintah") == figures("README.md", "Two commands") != []


def test_the_plan_in_the_tutorial_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["plan", f"model_name_or_path={tmp_path / 'config.json'}", "max_length=1024", "--gpu", "t4"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "120"}).stdout
    printed = {" ".join(line.split()) for line in shown.splitlines()}
    block = next(block.text for block in blocks_of(DOCS / "tutorial.md") if block.language == "text")
    assert [line for line in block.splitlines() if line and " ".join(line.split()) not in printed] == []
