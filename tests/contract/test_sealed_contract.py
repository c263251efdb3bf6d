"""The test set stays sealed, no split sees another, nothing is unpickled, and no secret is written down."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import laras
from laras import pipeline
from laras.errors import ExitCode, SealedTestError
from laras.records import SplitManifest
from tiny_models import base_model

PACKAGE = Path(laras.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
MARKERS = {
    "HF_TOKEN": "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",
    "WANDB_API_KEY": "MARKERsecretOFwandb" + "0" * 21,
    "AWS_SECRET_ACCESS_KEY": "MARKERsecretOFaws",
    "OPENAI_API_KEY": "sk-MARKERsecretOFopenai",
    "USER": "MARKERuser",
    "LOGNAME": "MARKERuser",
}
WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind", "moon", "leaf"]


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call of the package with its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield path, node, ast.unparse(node.func)


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    seen = 0
    for path, node, name in calls():
        seen += 1
        assert name not in FORBIDDEN_CALLS, (path, node.lineno)
        assert name.rpartition(".")[2] not in {"read_pickle", "unsafe_load", "full_load", "from_pickle"}, path
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "torch.load":
            value = keywords.get("weights_only")
            assert isinstance(value, ast.Constant) and value.value is True, (path, node.lineno)
        if name.endswith("np.load"):
            assert "allow_pickle" not in keywords, (path, node.lineno)
        if name == "yaml.load":
            loader = ast.unparse(node.args[1])
            tree = ast.parse(path.read_text(encoding="utf-8"))
            bases = [
                ast.unparse(b)
                for c in ast.walk(tree)
                if isinstance(c, ast.ClassDef) and c.name == loader
                for b in c.bases
            ]
            assert bases == ["yaml.SafeLoader"], (path, node.lineno)
        shell = keywords.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), (path, node.lineno)
        assert name not in {"os.system", "os.popen"}, (path, node.lineno)
        trusted = keywords.get("trust_remote_code")
        assert not (isinstance(trusted, ast.Constant) and trusted.value is True), (path, node.lineno)
    assert seen > 1_000


def test_no_module_that_unpickles_is_imported() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES, path


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "laras", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **MARKERS, "WANDB_MODE": "disabled", **environment},
    )


def planted() -> list[str]:
    """Forty answers, each four times: as it is, with a word changed, in capitals, with other spaces."""
    draw = random.Random(0)
    lines = []
    for number in range(40):
        words = [draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(60)]
        copies = [words, [*words[:30], "changed", *words[31:]], [word.upper() for word in words], words]
        for copy, separator in zip(copies, (" ", " ", " ", "  "), strict=True):
            turns = [("user", f"tell {number}"), ("assistant", separator.join(copy))]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.append(json.dumps({"messages": messages, "group": number}))
    draw.shuffle(lines)
    return lines


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("MARKERhome")
    base_model("llama", folder / "model", max_position_embeddings=1024)
    (folder / "chats.jsonl").write_text("\n".join(planted()) + "\n", encoding="utf-8")
    (folder / "laras.yaml").write_text(
        "model_name_or_path: model\ndataset: chats.jsonl\nmax_steps: 2\neffective_batch_size: 4\nmax_length: 512\n"
        "report_to: [tensorboard, wandb]\nrun_name: one\n",
        encoding="utf-8",
    )
    usual = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "offline"}
    done = command("train", "laras.yaml", "learning_rate=1e-3", "--test", cwd=folder, **usual)
    assert done.returncode == 0, done.stderr
    (folder / "train.out").write_text(done.stdout + done.stderr, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {**MARKERS, **usual}.items():
            patch.setenv(name, value)
        laras.export("runs/one", "adapter")
        laras.report("runs/one")
    return folder


def test_no_secret_and_no_name_of_the_user_is_written_down(workplace: Path) -> None:
    files = [path for path in (workplace / "runs").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "metrics.jsonl", "environment.json", "config.yaml"} <= names
    assert any("tfevents" in name for name in names)
    cached = [path for path in (workplace / "cache").rglob("*") if path.is_file()]
    assert any(path.name == "members.parquet" for path in cached)
    assert any("export" in path.parts for path in files) and any("wandb" in path.parts for path in files)
    for path in [*files, *cached, *workplace.glob("*.out")]:
        content = path.read_bytes()
        for name, marker in MARKERS.items():
            assert marker.encode() not in content, (name, path)
        if "wandb" not in path.parts:  # whose client writes down where its files are
            assert b"MARKERhome" not in content, path  # an absolute path of the machine


def test_planted_duplicates_never_stand_on_two_sides(workplace: Path) -> None:
    import pyarrow.parquet as pq

    from laras.data.sealed import unseal

    rows = [json.loads(line) for line in (workplace / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    run = workplace / "runs" / "one"
    places: dict[int, set[str]] = {}
    counted = 0
    for split, table in (
        ("train", pq.read_table(run / "splits" / "train.parquet")),
        ("validation", pq.read_table(run / "splits" / "validation.parquet")),
        ("test", unseal(run, SplitManifest.load(run).test.sha256)),
    ):
        found = table["row"].to_pylist()
        assert found, split
        counted += len(found)
        for row in found:
            places.setdefault(rows[row]["group"], set()).add(split)
    assert counted == len(rows)
    exact = {group: splits for group, splits in places.items() if len(splits) > 1}
    assert exact == {}


def test_the_test_set_opens_only_for_a_finished_run_and_unaltered(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    run = Path("runs") / "one"
    result = run / "records" / "result.json"
    ledger = run / "splits" / "sealed" / "openings.jsonl"
    whole, openings = result.read_text(encoding="utf-8"), ledger.read_text(encoding="utf-8")
    assert len(openings.splitlines()) == 1  # that of the fixture
    for status in ("running", "interrupted", "failed"):
        result.write_text(json.dumps({**json.loads(whole), "status": status}), encoding="utf-8")
        with pytest.raises(SealedTestError, match="stays sealed") as early:
            pipeline.test(run)
        assert early.value.exit_code == ExitCode.RUN_STATE
        assert early.value.hint
    result.write_text(whole, encoding="utf-8")
    sealed = run / "splits" / "sealed" / "test.sealed"
    kept = sealed.read_bytes()
    sealed.write_bytes((run / "splits" / "train.parquet").read_bytes())
    with pytest.raises(SealedTestError, match="no sealed test set"):
        pipeline.test(run)
    sealed.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(SealedTestError, match="altered"):
        pipeline.test(run)
    assert ledger.read_text(encoding="utf-8") == openings
    sealed.write_bytes(kept)
    assert pipeline.test(run, answers=0).openings == 2
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 2
