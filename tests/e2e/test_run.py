"""A whole run on a tiny model, through the command line: inspect, plan, train, test, runs, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.errors import ExitCode
from laras.records import TrainPlan
from laras.rundir import create_run_dir, hold
from tiny_models import base_model

WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind"]


def laras(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "laras", *words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )


def write_chats(path: Path, count: int = 60) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            first, second = WORDS[number % 12], WORDS[number // 12]
            question = {"role": "user", "content": f"what is {first} number {number} for a {second}"}
            answer = {"role": "assistant", "content": f"a {first} is what {second} does, {number} times over"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


def write_workplace(folder: Path, settings: str, at: str = "") -> Path:
    """A model, a dataset and a configuration, as a user has them.

    Args:
        folder: Where to write them.
        settings: Further lines of YAML.
        at: What stands before the paths in the configuration; nothing where `laras` runs in the folder.
    """
    base_model("llama", folder / "model")
    write_chats(folder / "chats.jsonl")
    named = f"model_name_or_path: {at}model\ndataset: {at}chats.jsonl\noutput_dir: {at}runs\n"
    shared = "effective_batch_size: 8\nmax_length: 256\nreport_to: []\n"
    (folder / "laras.yaml").write_text(named + shared + settings, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a dataset and a configuration, as a user has it, and one finished run."""
    folder = write_workplace(tmp_path_factory.mktemp("work"), "num_train_epochs: 2\nlearning_rate: 0.01\n")
    done = laras("train", "laras.yaml", "run_name=first", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "train.json").write_text(done.stdout, encoding="utf-8")
    small = shutil.copytree(folder / "model", folder / "small")  # of another tokenizer
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 200}), encoding="utf-8")
    yield folder


def only_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_train_leaves_the_run_directory_that_is_documented(workplace: Path) -> None:
    answer = json.loads((workplace / "train.json").read_text(encoding="utf-8"))
    assert answer["status"] == "finished"
    assert {"run_dir", "status", "steps", "best", "plan", "measured"} <= answer.keys()
    assert {"peak_allocated_bytes", "peak_reserved_bytes", "tokens_per_s"} <= answer["measured"].keys()
    run = workplace / answer["run_dir"]
    for name in ("config.yaml", "config.given.yaml", "logs/metrics.jsonl", "final/adapter_model.safetensors"):
        assert (run / name).is_file(), name
    for name in ("profile", "split", "plan", "environment", "result"):
        assert (run / "records" / f"{name}.json").is_file(), name
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"step", "epoch", "time_s"} <= line.keys() for line in lines)
    named = {key for line in lines for key in line}
    assert {"loss", "eval_loss", "grad_norm", "learning_rate", "eval_perplexity", "eval_token_accuracy"} <= named
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_records_form_a_chain_of_digests(workplace: Path) -> None:
    from laras.records import DatasetProfile, RunResult, SplitManifest

    run = workplace / "runs" / "first"
    profile, split, plan = DatasetProfile.load(run), SplitManifest.load(run), TrainPlan.load(run)
    assert split.parent_digest == profile.digest()
    assert plan.parent_digest == split.digest()
    assert RunResult.load(run).parent_digest == plan.digest()


def test_inspect_says_what_programs_rely_on(workplace: Path) -> None:
    answer = only_json(laras("inspect", "laras.yaml", "--json", cwd=workplace))
    assert (answer["format"], answer["rows"], answer["kept_rows"], answer["problems"]) == ("messages", 60, 60, [])
    assert {"min", "max", "mean", "median", "p90", "p95", "p99", "total", "target_total"} <= answer["tokens"].keys()
    assert {"truncated_rows", "duplicate_rows", "near_duplicate_groups"} <= answer.keys()
    assert sum(answer["splits"][name]["rows"] for name in ("train", "validation", "test")) == 60


def test_plan_says_what_programs_rely_on(workplace: Path) -> None:
    answer = only_json(laras("plan", "laras.yaml", "--gpu", "t4", "--json", cwd=workplace))
    assert {"gpu", "fits", "choices", "reasons", "memory", "time", "alternatives"} <= answer.keys()
    assert answer["choices"]["precision"] == "fp16"
    assert {"tokens_per_s", "steps", "total_s"} <= answer["time"].keys()


def test_the_sealed_set_scores_base_and_tuned_and_counts_its_openings(workplace: Path) -> None:
    first = only_json(laras("test", "runs/first", "--json", cwd=workplace))
    second = only_json(laras("test", "runs/first", "--json", cwd=workplace))
    assert second["openings"] == first["openings"] + 1
    for name in ("base", "tuned"):
        assert {"loss", "perplexity", "token_accuracy", "target_tokens", "examples"} <= first[name].keys()
        assert first[name]["loss"] == second[name]["loss"]
    assert first["tuned"]["loss"] < first["base"]["loss"]
    shown = laras("runs", cwd=workplace)
    assert "finished" in shown.stdout and "first" in shown.stdout


def test_a_person_sees_progress_on_stderr_and_the_score_on_stdout(workplace: Path) -> None:
    done = laras("train", "laras.yaml", "num_train_epochs=1", "--test", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "Sealed test set" in done.stdout
    assert "perplexity" in done.stdout
    assert "val. loss" in done.stderr


def test_nothing_is_left_behind_when_a_row_is_bad_and_every_bad_row_is_named(workplace: Path) -> None:
    bad = workplace / "bad.jsonl"
    write_chats(bad, 20)
    with bad.open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n{"messages": [\n')
    done = laras("train", "laras.yaml", "dataset=bad.jsonl", "run_name=bad", cwd=workplace)
    assert done.returncode == ExitCode.DATA
    assert "bad.jsonl:21" in done.stderr and "bad.jsonl:22" in done.stderr
    assert "hint:" in done.stderr
    assert not (workplace / "runs" / "bad").exists()
    told = laras("inspect", "laras.yaml", "dataset=bad.jsonl", "--json", cwd=workplace)
    assert told.returncode == ExitCode.DATA
    assert [problem["line"] for problem in json.loads(told.stdout)["problems"]] == [21, 22]
    skipped = only_json(
        laras("inspect", "laras.yaml", "dataset=bad.jsonl", "on_bad_rows=skip", "--json", cwd=workplace)
    )
    assert (skipped["rows"], skipped["kept_rows"], len(skipped["problems"])) == (22, 20, 2)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["train", "absent.yaml"], ExitCode.USAGE, "no configuration file absent.yaml"),
        (["train", "laras.yaml", "learning_rte=1"], ExitCode.USAGE, "did you mean 'learning_rate'"),
        (["inspect", "laras.yaml", "dataset=absent.jsonl"], ExitCode.DATA, "absent.jsonl"),
        (["inspect", "laras.yaml", "model_name_or_path=./absent"], ExitCode.USAGE, "does not exist"),
        (["train", "laras.yaml", "run_name=first"], ExitCode.RUN_STATE, "exists already"),
        (["resume", "runs/absent"], ExitCode.RUN_STATE, "is not a run"),
        (["test", "runs/absent"], ExitCode.RUN_STATE, "is not a run"),
        (["plan", "laras.yaml", "--gpu", "h10"], ExitCode.USAGE, "did you mean"),
        (
            ["train", "laras.yaml", "lora_target_modules=[lm_head]"],
            ExitCode.USAGE,
            "lm_head not found among the layers",
        ),
        (["inspect", "laras.yaml", "model_name_or_path=small"], ExitCode.USAGE, "has embeddings for 200 tokens"),
        pytest.param(
            ["train", "laras.yaml", "--gpu", "t4"],
            ExitCode.USAGE,
            "the plan would be for T4, as `gpu` says",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has the GPU that the plan asks for"),
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_hint_and_its_code(
    workplace: Path, words: list[str], code: ExitCode, text: str
) -> None:
    done = laras(*words, cwd=workplace)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_resumed(workplace: Path) -> None:
    done = laras("resume", "runs/first", cwd=workplace)
    assert done.returncode == ExitCode.RUN_STATE
    assert "finished" in done.stderr


def test_a_resume_of_a_run_in_use_touches_none_of_its_checkpoints(workplace: Path) -> None:
    run = create_run_dir(RunConfig(output_dir=str(workplace / "runs"), run_name="held"))
    run.config.write_text(config_to_yaml(RunConfig(run_name="held")), encoding="utf-8")
    TrainPlan.load(workplace / "runs" / "first").save(run.path)
    (run.checkpoints / "step-1").mkdir(parents=True)  # whoever resumes would set it aside as damaged
    with hold(run):
        done = laras("resume", "runs/held", cwd=workplace)
    assert done.returncode == ExitCode.RUN_STATE
    assert "is in use by process" in done.stderr
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-1"]
