"""What the configuration alone rules out is refused before anything is read or trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from laras import pipeline
from laras.cli.main import app
from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.data.analyze import length_stats
from laras.errors import ConfigError, SealedTestError
from laras.planning import hardware
from laras.records import SplitInfo, SplitManifest
from laras.sweeping import sweep

NO_TEST = {"split": {"test": 0}}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of rows in a folder where nobody may load a tokenizer or read them."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "sea and salt"}\n', encoding="utf-8")

    def too_late(*given: Any, **named: Any) -> Any:
        raise AssertionError("the refusal comes too late")

    monkeypatch.setattr(pipeline, "load_tokenizer_of", too_late)
    monkeypatch.chdir(tmp_path)
    return path


def config(data: Path, **settings: Any) -> RunConfig:
    return RunConfig.model_validate({"dataset": str(data), "output_dir": "runs", **settings})


def test_a_score_without_sealed_rows_is_refused_before_training(data: Path) -> None:
    for dataset in (str(data), {"train": str(data), "validation": str(data)}):
        with pytest.raises(ConfigError, match=r"0 rows: split\.test is 0\.0; at least 1") as caught:
            pipeline.train(config(data, dataset=dataset, **NO_TEST), will_test=True)
        assert "split.test, say to 0.1" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match=r"split\.test is 0\.0"):
        sweep.run_sweep(config(data, **NO_TEST), will_test=True)


@pytest.mark.parametrize("word", ["train", "sweep"])
def test_the_option_is_what_promises_a_score(data: Path, word: str) -> None:
    words = [word, f"dataset={data}", "split.test=0", "--test"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError) and "--test scores" in done.exception.message


def test_rows_that_are_given_for_the_test_are_enough(data: Path) -> None:
    (data.parent / "parts").mkdir()
    for name in ("train", "test"):
        (data.parent / "parts" / f"{name}.jsonl").write_bytes(data.read_bytes())
    for dataset in ({"train": str(data), "test": str(data)}, "parts"):
        with pytest.raises(AssertionError, match="too late"):
            pipeline.train(config(data, dataset=dataset, **NO_TEST), will_test=True)


def test_a_test_file_without_a_good_row_is_refused_before_training(data: Path) -> None:
    manifest: Any = SimpleNamespace(test=SimpleNamespace(rows=0))
    with pytest.raises(ConfigError, match="it would hold 0 rows"):
        pipeline.require_test_rows(config(data), manifest)


def test_a_card_that_is_not_here_is_refused_before_the_data_are_read(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_local_gpu", lambda: None)
    with pytest.raises(ConfigError, match="would be for T4, as `gpu` says"):
        pipeline.train(config(data, gpu="t4"))
    with pytest.raises(ConfigError, match="did you mean"):
        pipeline.train(config(data, gpu="h10"))
    with pytest.raises(ConfigError, match="would be for T4, as `gpu` says"):
        sweep.run_sweep(config(data, gpu="t4"))


def test_a_resume_that_could_not_be_scored_is_refused_before_training(data: Path) -> None:
    run = data.parent / "run"
    info = SplitInfo(rows=0, tokens=length_stats(np.array([], int), np.array([], int)), sha256="0" * 64)
    SplitManifest(seed=42, ratios=(1, 0, 0), stratify_by=None, train=info, validation=info, test=info).save(run)
    (run / "config.yaml").write_text(config_to_yaml(config(data)), encoding="utf-8")
    with pytest.raises(SealedTestError, match="has no test set"):
        pipeline.resume(run, will_test=True)
