"""One page tells everything about a run, loads nothing, runs nothing, and says what is missing."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from example_run import write_example_run
from laras import formatting
from laras.cli.report import report_command
from laras.errors import ConfigError, RunStateError
from laras.record_base import digest_of
from laras.records import (
    DatasetProfile,
    EvalResult,
    Measured,
    ParentRun,
    PlanChange,
    PlanRevision,
    RunEvent,
    RunResult,
    SplitManifest,
    TrainPlan,
)
from laras.reporting.charts import optimization_chart
from laras.reporting.data_charts import lengths_chart
from laras.reporting.drawing import drawing_style, finish, log_scale, new_figure, step_axis
from laras.reporting.report import verdict, write_report
from laras.reporting.run_data import load_run_data

SECTIONS = ("score", "curves", "optimization", "memory", "data", "plan", "samples", "environment")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'{{7*7}}</svg></pre>"


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_example_run(tmp_path_factory.mktemp("runs") / "my-run")


@pytest.fixture(scope="module")
def html(run):
    return write_report([run]).read_text(encoding="utf-8")


def test_every_section_has_what_its_records_say(html):
    page = Page(html)
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert {f"section-{name}" for name in SECTIONS} <= ids
    for text in ("1.1600", "2.3100", "1.1000 to 1.2200", "laras test", "opened 2 times", "out of memory", "early stop",
                 "micro-batch 4 -> 2", "the last turn is empty", "44 groups", "3 rows that resemble", "maths",
                 "the GPU computes in bf16", "NVIDIA L4", "2.13.0", "It depends on what you mean", "best, step 450",
                 "(not at hand)", "backward of the last layer", "the validation split is small"):  # fmt: skip
        assert text in page.text, text
    assert "No record" not in page.text


def test_the_page_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "img")]
    loaded = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href") and v]
    assert all(value.startswith(("#", "data:,")) for value in loaded)
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(http" not in html


def test_strings_of_a_record_are_shown_and_never_become_markup(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30, hostile=HOSTILE)
    hostile_page = Page(write_report([run]).read_text(encoding="utf-8"))
    plain_page = Page(write_report([write_example_run(tmp_path / "plain", steps=30)]).read_text(encoding="utf-8"))
    assert [tag for tag, _ in hostile_page.tags] == [tag for tag, _ in plain_page.tags]
    assert not [attrs for _, attrs in hostile_page.tags if any(name.startswith("on") for name in attrs)]
    assert "<script>alert(1)</script>" in hostile_page.text
    assert "{{7*7}}" in hostile_page.text


def test_figures_have_title_description_and_no_colour_outside_the_style_sheet(html):
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 6
    seen: set[str] = set()
    for drawing in drawings:
        root = ET.fromstring(drawing)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert root.get("role") == "img"
        assert set(root.get("aria-labelledby").split()) <= set(ids)
        assert len(root.findtext("{http://www.w3.org/2000/svg}desc")) > 40
        assert not seen & set(ids)
        seen |= set(ids)
        assert not re.search(r"#[0-9a-fA-F]{6}", drawing)
        assert set(re.findall(r"url\(#([^)]+)\)", drawing)) <= set(ids)


def test_equal_data_gives_equal_pages(run, html):
    assert write_report([run]).read_text(encoding="utf-8") == html


def test_a_run_that_is_still_going_says_what_is_missing(tmp_path):
    run = write_example_run(tmp_path / "run", finished=False, steps=40)
    page = Page(write_report([run]).read_text(encoding="utf-8"))
    assert page.text.count("No record") == 2  # score, answers
    assert "has never been opened" in page.text
    assert "None so far" in page.text


def test_a_session_that_has_begun_or_was_killed_shows_what_the_metrics_and_checkpoints_know(tmp_path):
    run = write_example_run(tmp_path / "run", finished=False, steps=40)
    begun = Measured(peak_allocated_bytes=7, peak_reserved_bytes=7, tokens_per_s=0.0, elapsed_s=0.1)
    RunResult(
        parent_digest=TrainPlan.load(run).digest(), status="running", steps=0, epochs=0, train_loss=None, best=None,
        stopped_early=False, measured=begun, events=(RunEvent(step=0, kind="resume", detail="went on from step-0"),),
    ).save(run)  # fmt: skip
    events = [RunEvent(step=9, kind="out_of_memory", detail="micro-batch 4 -> 2").model_dump()]
    for name, text in (("step-10", json.dumps({"counters": {"events": events}})), ("step-20", "{broken")):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "training.json").write_text(text)
    data = load_run_data(run)
    assert (data.status, data.is_over, data.steps) == ("interrupted", False, 40)
    assert data.measured.elapsed_s == 16.0
    assert 5000 < data.measured.tokens_per_s < 5400
    assert data.measured.peak_allocated_bytes > 3 * 2**30
    assert [event.kind for event in data.events] == ["resume", "out_of_memory"]
    page = Page(write_report([run]).read_text(encoding="utf-8"))
    assert "40 of 40" in page.text and "Time so far16 s" in page.text
    assert "micro-batch 4 -> 2" in page.text and "As far as the newest checkpoint knows" in page.text


def test_the_time_of_a_resumed_run_is_that_of_all_its_sessions(tmp_path):
    run = write_example_run(tmp_path / "run", steps=40)
    result = RunResult.load(run)
    last = result.measured.model_copy(update={"elapsed_s": 3.0, "peak_allocated_bytes": 1})
    result.model_copy(update={"measured": last}).save(run)
    measured = load_run_data(run).measured
    assert measured.elapsed_s == 16.0
    assert measured.peak_allocated_bytes > 3 * 2**30


def test_a_run_with_nothing_but_its_configuration_has_a_page(tmp_path):
    run = write_example_run(tmp_path / "run", finished=False, steps=40)
    for path in (run / "records").iterdir():
        path.unlink()
    (run / "logs" / "metrics.jsonl").unlink()
    html = write_report([run]).read_text(encoding="utf-8")
    assert Page(html).text.count("No record") >= 9
    assert "<svg" not in html


def test_a_damaged_record_is_named_and_the_rest_is_shown(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30)
    (run / "records" / "plan.json").write_text("{")
    (run / "splits" / "sealed" / "openings.jsonl").write_text("nonsense\n")
    (run / "config.yaml").write_text("no_such_key: 1\n")
    page = Page(write_report([run]).read_text(encoding="utf-8"))
    assert "plan.json is damaged" in page.text
    assert "no line of the ledger" in page.text
    assert "config.yaml does not validate" in page.text
    assert "1.1600" in page.text


def test_a_record_that_was_changed_afterwards_breaks_the_chain(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30)
    assert all(link.holds for link in load_run_data(run).chain)
    TrainPlan.load(run).model_copy(update={"total_steps": 999}).save(run)
    broken = [(link.parent, link.child) for link in load_run_data(run).chain if not link.holds]
    assert broken == [("plan", "result")]
    assert "does not match" in write_report([run]).read_text(encoding="utf-8")


def test_the_chain_goes_back_to_the_run_it_started_from_and_through_the_revision_of_the_plan(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30)
    parent = ParentRun(run="earlier", model="best", step=40, eval_loss=1.5, weights_sha256="ab" * 32)
    parent.save(run)
    records = [DatasetProfile.load(run), SplitManifest.load(run), TrainPlan.load(run)]
    digest = parent.digest()
    for record in records:
        changed = record.model_copy(update={"parent_digest": digest})
        changed.save(run)
        digest = changed.digest()
    RunResult.load(run).model_copy(update={"parent_digest": digest}).save(run)
    change = PlanChange(step=3, reason="micro-batch 4 rows -> 2 rows", train_split_level=1, eval_split_level=0)
    revision = PlanRevision(
        parent_digest=digest, train_split_level=1, eval_split_level=0, micro_batch="2 rows",
        per_device_eval_batch_size=8, changes=(change,),
    )  # fmt: skip
    revision.save(run)
    before = [(link.parent, link.child) for link in load_run_data(run).chain if link.holds]
    assert ("plan", "result") in before  # a session that was killed had begun before memory ran out
    RunResult.load(run).model_copy(update={"parent_digest": revision.digest()}).save(run)
    EvalResult.load(run).model_copy(update={"parent_digest": RunResult.load(run).digest()}).save(run)
    chain = load_run_data(run).chain
    names = ["parent", "profile", "split", "plan", "revision", "result", "evaluation"]
    assert [(link.parent, link.child, link.holds) for link in chain] == [(*pair, True) for pair in pairwise(names)]
    assert "earlier, best, step 40" in Page(write_report([run]).read_text(encoding="utf-8")).text


def test_the_chain_of_a_run_of_an_older_version_holds(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30)
    parent = None
    for record, later_field in (
        (DatasetProfile, "unused_columns"),
        (SplitManifest, "members_sha256"),
        (TrainPlan, "remedies"),
        (RunResult, "events"),
        (EvalResult, "schema_version"),
    ):
        path = run / "records" / f"{record.name}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        del content[later_field]
        content["parent_digest"] = parent
        path.write_text(json.dumps(content), encoding="utf-8")
        parent = digest_of(content)
    chain = load_run_data(run).chain
    assert len(chain) == 4 and all(link.holds for link in chain)


@pytest.mark.parametrize(
    ("interval", "kind", "words"),
    [((0.1, 0.2), "good", "better"), ((-0.2, -0.1), "bad", "worse"), ((-0.1, 0.1), "open", "No difference")],
)
def test_the_verdict_says_no_more_than_the_interval_does(tmp_path, interval, kind, words):
    run = write_example_run(tmp_path / "run", steps=30)
    EvalResult.load(run).model_copy(update={"loss_improvement_ci95": interval}).save(run)
    text, found = verdict(load_run_data(run))
    assert found == kind
    assert words in text
    (run / "records" / "evaluation.json").unlink()
    assert "Not scored yet" in verdict(load_run_data(run))[0]


def test_several_runs_are_compared(run, tmp_path):
    other = write_example_run(tmp_path / "my-run", seed=1, steps=60)
    going = write_example_run(tmp_path / "going", finished=False, steps=30)
    page = Page(write_report([run, other, going], tmp_path / "deep" / "page.html").read_text(encoding="utf-8"))
    assert str(other) in page.text  # two runs of one name are told apart
    for text in ("3 runs compared", "1.1600", "1.2100", "config: seed", "was interrupted"):
        assert text in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 2


def test_runs_with_different_test_sets_are_not_ranked(run, tmp_path):
    other = write_example_run(tmp_path / "other", steps=30)
    text = (other / "records" / "split.json").read_text().replace(f"{454:064x}", f"{455:064x}")
    (other / "records" / "split.json").write_text(text)
    assert "different test sets" in write_report([run, other], tmp_path / "page.html").read_text(encoding="utf-8")
    (other / "records" / "split.json").write_text(text.replace('"sha256": "', '"sha256": "f'))
    assert "different validation and test sets" in write_report([run, other], tmp_path / "page.html").read_text()


def test_main_memory_that_a_plan_takes_is_said(tmp_path, html):
    assert "of main memory" not in html
    run = write_example_run(tmp_path / "run", steps=30)
    plan = TrainPlan.load(run)
    other = plan.alternatives[0].model_copy(update={"checkpoint_kind": "offload"})
    memory = plan.memory.model_copy(update={"host_bytes": 3 * 2**29})
    plan.model_copy(update={"memory": memory, "alternatives": (other,)}).save(run)
    page = write_report([run]).read_text(encoding="utf-8")
    assert "inputs of layers hold 1.50 GiB of main memory" in page
    assert "<td>offload</td>" in page


def test_a_plan_far_from_what_is_measured_leaves_the_curves_their_scale(tmp_path):
    run = write_example_run(tmp_path / "run", steps=30)
    plan = TrainPlan.load(run)
    for factor, words in ((1.0, "planned 5.4k<"), (40.0, "planned 216k, beyond this axis")):
        time_ = plan.time.model_copy(update={"tokens_per_s": 5400 * factor})
        memory = plan.memory.model_copy(update={"device_budget_bytes": int(5 * factor * 2**30)})
        plan.model_copy(update={"time": time_, "memory": memory}).save(run)
        html = write_report([run]).read_text(encoding="utf-8")
        assert words in html
        assert ("budget 200.00 GiB, beyond this axis" in html) == (factor > 1)
    assert "cap 2,048<" in html
    with drawing_style():
        assert "cap 9,000, beyond this axis" in lengths_chart(SplitManifest.load(run), 9000).svg


def test_equal_runs_without_metrics_compare_too(tmp_path):
    runs = [write_example_run(tmp_path / name, finished=False, steps=5) for name in ("a", "b")]
    for one in runs:
        (one / "logs" / "metrics.jsonl").unlink()
        for path in (one / "records").iterdir():
            path.unlink()
    text = Page(write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "no run has logged a loss" in text
    assert "equal settings" in text


def test_a_long_run_is_quick_and_small_and_keeps_its_spike(tmp_path):
    run = write_example_run(tmp_path / "run", steps=100_000)
    started = time.perf_counter()
    path = write_report([run])
    elapsed_s = time.perf_counter() - started
    assert path.stat().st_size < 1_500_000
    assert elapsed_s < 5 * 2  # 2.4 s on two idle cores; a loaded machine gets twice the limit of 5 s
    page = path.read_text(encoding="utf-8")
    highest = load_run_data(run).history.get("loss").value.max()
    assert formatting.number(float(highest)) in page
    assert "Validation values" in page


def test_wide_curves_are_drawn_on_a_logarithmic_scale_and_single_points_are_seen(tmp_path):
    run = write_example_run(tmp_path / "run", finished=False, steps=1)
    (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "<svg" in write_report([run]).read_text(encoding="utf-8")
    (run / "logs" / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "loss": {1000 / s**3}, "memory/peak_bytes": {2**31}}}\n' for s in range(1, 30))
    )
    assert "peak" in write_report([run]).read_text(encoding="utf-8")


def test_a_curve_of_one_small_value_has_distinct_ticks_and_whole_titles(tmp_path):
    run = write_example_run(tmp_path / "run", steps=20, finished=False)
    line = {"step": 10, "epoch": 0.5, "time_s": 9.0, "loss": 1.9, "learning_rate": 5.8e-5, "tokens_per_s": 70.0}
    (run / "logs" / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with drawing_style():
        svg = optimization_chart(load_run_data(run)).svg
    texts = [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(step) for step in ("9", "10", "11")] == [1, 1, 1]
    assert not [text for text in texts if text.startswith("1e")]  # a factor would push the title out of the picture
    assert "5.8e-5" in texts


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ((0.012, 0.09), ["0.02", "0.05"]),
        ((2e-5, 2e-3), ["3e-5", "1e-4", "3e-4", "0.001"]),  # a sweep's learning rates, in a third of the page
        ((1e-5, 1e-1), ["1e-4", "0.001", "0.01"]),
    ],
)
def test_a_logarithmic_scale_names_more_than_one_value(ends, named):
    with drawing_style():
        figure, (axis,) = new_figure()
        axis.plot(ends, ends)
        log_scale(axis, "x")
        svg = finish(figure, "x", "x", "x").svg
    texts = [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert set(named) <= set(texts)
    assert len(texts) < 20


def test_labels_that_widen_with_the_final_height_are_not_cut():
    with drawing_style():
        figure, (axis,) = new_figure(height=2.7)
        axis.plot([0, 1, 2, 3], [5.8883, 5.0252, 4.9683, 5.9621])
        axis.set_title("x")
        axis.margins(y=0.2)
        step_axis(axis)
        figure.legend(["x"], loc="outside lower center")
        finish(figure, "x", "x", "x")
        labels = axis.yaxis.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert labels.x0 >= 0


def test_many_events_of_any_kind_are_listed_and_marked(tmp_path):
    run = write_example_run(tmp_path / "run", steps=90)
    result = RunResult.load(run)
    event = result.events[0]
    many = tuple(event.model_copy(update={"step": s, "kind": "skipped-step"}) for s in range(1, 61))
    result.model_copy(update={"events": many}).save(run)
    assert Page(write_report([run]).read_text(encoding="utf-8")).text.count("skipped-step") >= 60


def test_what_cannot_be_read_or_written_is_a_clear_error(tmp_path, run):
    with pytest.raises(RunStateError, match="no run is named"):
        write_report([])
    with pytest.raises(RunStateError, match="is not a run"):
        write_report([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report([run], tmp_path / "file" / "page.html")


def test_the_command_prints_the_path(run, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(report_command)
    done = CliRunner().invoke(app, [str(run), "--output", str(tmp_path / "page.html")])
    assert (done.exit_code, done.output) == (0, f"{tmp_path / 'page.html'}\n")


def test_a_colour_that_the_page_does_not_know_stays_as_it_is():
    with drawing_style():
        figure, (axis,) = new_figure()
        axis.plot([0, 1], [0, 1], color="#123456")
        assert "#123456" in finish(figure, "x", "title", "description").svg
