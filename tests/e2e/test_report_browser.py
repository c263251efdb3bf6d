"""The pages of a run, of several runs and of a sweep, as headless Chromium shows them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from example_run import write_example_run
from example_sweep import write_example_sweep
from laras.reporting.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

MEASURE = """
<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
const named = e => (e.getAttribute("aria-label") || e.textContent || "").trim().length > 0 || e.closest("[aria-label]");
const focusable = [...document.querySelectorAll("a, summary, [tabindex]")].filter(e => e.checkVisibility());
const paint = getComputedStyle(document.querySelector("svg text"));
const result = {
  figures: [...document.querySelectorAll("svg")].map(e => ({box: box(e), drawn: box(e.querySelector("g")),
    cut: [...e.querySelectorAll("text")].filter(t => { const [a, b] = [e, t].map(x => x.getBoundingClientRect());
      return b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1; })
      .map(t => t.textContent),
    label: e.getAttribute("aria-labelledby").split(" ").map(i => document.getElementById(i).textContent).join(" ")})),
  unfocusable: focusable.filter(e => { e.focus(); return document.activeElement !== e; })
    .map(e => e.outerHTML.slice(0, 80)),
  unnamed: focusable.filter(e => !named(e)).map(e => e.outerHTML.slice(0, 80)),
  focusable: focusable.length, ink: paint.fill, background: getComputedStyle(document.body).backgroundColor,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
document.body.innerHTML = "<pre id=measured></pre>";
document.getElementById("measured").textContent = JSON.stringify(result);
</script>
"""


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def measure(page: Path, *options: str) -> dict:
    """The page with a script that measures it; the report itself allows none."""
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    probe = page.with_name("probe.html")
    probe.write_text(html.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    dom = chromium(probe, "--dump-dom", *options).stdout
    text = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


# Figures of each page, and what at least can be focused on it.
PAGES = {"run": (6, 20), "comparison": (2, 8), "sweep": (3, 12)}


@pytest.fixture(scope="module", params=PAGES)
def page(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sweep":
        return write_report([write_example_sweep(folder / "sweep", evaluated=True)])
    runs = [write_example_run(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    return write_report(runs[:1]) if request.param == "run" else write_report(runs, folder / "comparison.html")


def test_every_figure_is_drawn_and_everything_can_be_reached_and_is_named(page, request):
    figures, focusable = PAGES[request.node.callspec.params["page"]]
    found = measure(page, "--window-size=1200,900")
    assert len(found["figures"]) == figures
    for figure in found["figures"]:
        assert min(figure["box"] + figure["drawn"]) > 50
        assert len(figure["label"]) > 60
        assert figure["cut"] == []
    assert found["focusable"] > focusable
    assert (found["unfocusable"], found["unnamed"]) == ([], [])
    assert found["overflow"] <= 0


def test_a_dark_theme_changes_page_and_figures_and_a_narrow_screen_scrolls_figures_and_not_the_page(page):
    light = measure(page)
    dark = measure(page, "--blink-settings=preferredColorScheme=0", "--window-size=500,900")
    assert light["ink"] != dark["ink"]
    assert light["background"] != dark["background"]
    assert dark["overflow"] <= 0


def test_the_console_stays_empty_and_the_page_prints(page, tmp_path):
    pdf = tmp_path / "page.pdf"
    done = chromium(page, f"--print-to-pdf={pdf}")
    assert "CONSOLE" not in done.stderr
    assert pdf.read_bytes().startswith(b"%PDF")


def test_a_script_in_the_page_would_be_refused(page):
    probe = page.with_name("script.html")
    html = page.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'ran'</script></body>")
    probe.write_text(html, encoding="utf-8")
    assert "<title>ran</title>" not in chromium(probe, "--dump-dom").stdout
