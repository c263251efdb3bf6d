"""The page of a sweep as headless Chromium shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report_browser import CHROMIUM, chromium, measure

from example_sweep import write_example_sweep
from laras.reporting.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_example_sweep(tmp_path_factory.mktemp("runs") / "sweep", evaluated=True)])


def test_every_figure_is_drawn_and_everything_can_be_reached_and_is_named(page: Path) -> None:
    found = measure(page, "--window-size=1200,900")
    assert len(found["figures"]) == 3
    for figure in found["figures"]:
        assert min(figure["box"] + figure["drawn"]) > 50
        assert len(figure["label"]) > 60
    assert found["focusable"] > 12
    assert (found["unfocusable"], found["unnamed"]) == ([], [])
    assert found["overflow"] <= 0


def test_themes_differ_and_a_narrow_screen_scrolls_figures_and_not_the_page(page: Path) -> None:
    light = measure(page)
    dark = measure(page, "--blink-settings=preferredColorScheme=0", "--window-size=500,900")
    assert light["ink"] != dark["ink"] and light["background"] != dark["background"]
    assert dark["overflow"] <= 0


def test_the_console_stays_empty_and_the_page_prints(page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    done = chromium(page, f"--print-to-pdf={pdf}")
    assert "CONSOLE" not in done.stderr
    assert pdf.read_bytes().startswith(b"%PDF")
