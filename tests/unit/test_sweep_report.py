"""The page of a sweep: every trial, honest about what a lowest validation loss is worth."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from example_run import write_example_run
from example_sweep import write_example_sweep
from laras.errors import RunStateError
from laras.reporting.report import write_report
from laras.sweep_record import final_run, final_runs, sweep_of, trial_dir


def page_of(sweep: Path) -> str:
    return write_report([sweep]).read_text(encoding="utf-8")


def test_it_shows_every_trial_with_its_values_and_its_fate(tmp_path: Path) -> None:
    page = page_of(write_example_sweep(tmp_path / "sweep"))
    rows = re.findall(r'<tr><th scope="row">(?:<a href="[^"]+">)?(\d{3})(?:</a>)?</th>(.*?)</tr>', page, re.DOTALL)
    assert [number for number, _ in rows] == ["000", "001", "002", "003", "004"]
    for status, (_, row) in zip(("finished", "finished", "pruned", "failed", "finished"), rows, strict=True):
        assert status in row
    assert "★ best, the final model" in rows[1][1] and page.count("★") == 1
    assert "above the median" in rows[2][1]
    for name in ("learning_rate", "lora_r", "num_train_epochs", "use_rslora"):
        assert f'<th scope="col">{name}</th>' in page
    assert 'href="trials/001/report.html"' in page and 'href="trials/002/report.html"' not in page
    assert "<script" not in page and "http:" not in re.sub(r'xmlns[^"]*"[^"]*"', "", page)


def test_its_figures_are_drawn_and_described(tmp_path: Path) -> None:
    page = page_of(write_example_sweep(tmp_path / "sweep"))
    figures = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(figures) == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for figure in figures:
        described = figure.find("{http://www.w3.org/2000/svg}desc")
        assert described is not None and len(str(described.text)) > 60
    words = " ".join(text for figure in figures for text in figure.itertext())
    assert all(word in words for word in ("finished", "pruned", "failed", "best until then", "learning_rate"))


def test_it_says_what_the_lowest_of_many_losses_is_worth(tmp_path: Path) -> None:
    page = page_of(write_example_sweep(tmp_path / "sweep"))
    assert "is the best of 5" in page and "that is optimistic; laras test gives the honest score" in page
    assert "never been opened" in page
    scored = page_of(write_example_sweep(tmp_path / "scored", evaluated=True))
    assert "the sealed test set is not: loss" in scored and "95% interval" in scored
    assert "5 trials" in scored and "never been opened" not in scored


def test_a_sweep_that_was_killed_is_shown_as_interrupted_and_has_no_final_model(tmp_path: Path) -> None:
    for name, unfinished in (("some", False), ("none", True)):
        sweep = write_example_sweep(tmp_path / name, ended=False, unfinished=unfinished)
        page = page_of(sweep)
        assert '<span class="status interrupted">' in page and "◐" not in page
        assert "the final model" not in page.split("What it is worth")[0]
        with pytest.raises(RunStateError, match="without a final model yet"):
            final_run(sweep)
    assert "None of 1 trials has finished so far" in page
    assert final_runs(tmp_path) == []


def test_words_of_strangers_are_text(tmp_path: Path) -> None:
    page = page_of(write_example_sweep(tmp_path / "s<b>weep", evaluated=True, hostile="<img src=x>"))
    assert "<img" not in page and "<b>" not in page
    assert "&lt;img src=x&gt;" in page


def test_beside_other_runs_a_sweep_stands_for_its_final_model(tmp_path: Path) -> None:
    sweep, run = write_example_sweep(tmp_path / "sweep"), write_example_run(tmp_path / "run", steps=24)
    assert final_run(sweep) == trial_dir(sweep, 1) and final_run(run) == run
    assert final_runs(tmp_path) == [trial_dir(sweep, 1)]
    assert sweep_of(trial_dir(sweep, 4)) == sweep.resolve() and sweep_of(run) is None
    page = write_report([sweep, run], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page and "001" in page
    alone = write_report([sweep], tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
    assert 'href="trials/' not in alone, "its trials are not to be found from there"
