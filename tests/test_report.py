"""Figures, tables and the report: what they hold, and that the page works in a browser without a network."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import optuna
import plotly.graph_objects as go
import pytest
from conftest import CHROMIUM
from optuna.distributions import IntDistribution
from rich.console import Console
from stand_in_studies import LAYERS, LOW, MAX_LENGTH, baselines_of, front_of, report_on_other_rows, stand_in_study

from lat_optuna import figures, report, summary
from lat_optuna.search.front import Baselines, Front, Measured, Point, standard_error
from lat_optuna.search.front import auc as area_under

BASELINES = baselines_of()
WORDS = report.KeptWords(
    tokens=("[CLS]", "un", "##hurried", "<b>", "[SEP]"),
    kept=((True, True, True, True, False), (True, False, True, False, False)),
    title="an example",
)


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    return stand_in_study(60)


@pytest.fixture(scope="module")
def front(study) -> Front:
    return front_of(study)


@pytest.fixture(scope="module")
def apart() -> tuple[Front, Baselines]:
    """The front of a study whose search had a split of its own, and what it is compared with."""
    study = stand_in_study(60)
    report_on_other_rows(study)
    return front_of(study), baselines_of(apart=True)


# ---------------------------------------------------------------------- tables


def test_the_table_compares_with_the_standard_model(front):
    rows = {row.name: row for row in summary.table(front, BASELINES)}
    assert list(rows) == [
        "standard model, dense",
        "length-adaptive model, dense",
        "best point",
        "cheapest point without loss",
        "smallest point",
    ]
    lossless = rows["cheapest point without loss"]
    assert lossless.cost == min(point.cost for point in front.evaluated if point.metric >= 87.0)
    assert rows["best point"].metric == max(point.metric for point in front.evaluated)
    assert rows["smallest point"].cost == LOW
    for row in rows.values():
        assert row.change == pytest.approx(row.metric - 87.0)
        assert row.error == pytest.approx(standard_error(row.metric, 872))
        assert row.reported is None


def test_figures_of_two_splits_stay_apart(apart):
    front, baselines = apart
    splits = summary.Splits.of(front, baselines)
    assert splits == summary.Splits(apart=True, searched=2000, reported=872)
    rows = {row.name: row for row in summary.table(front, baselines)}
    lossless = rows["cheapest point without loss"]
    # Chosen by the split that was searched on; what it is worth is said on the other.
    assert lossless.cost == min(point.cost for point in front.points if point.metric >= 87.0)
    assert lossless.reported == pytest.approx(lossless.metric - 1.5)
    assert lossless.change == pytest.approx(lossless.reported - 86.0)
    assert lossless.error == pytest.approx(standard_error(lossless.metric, 2000))
    assert lossless.reported_error == pytest.approx(standard_error(lossless.reported, 872))
    heading, first, *_ = summary.front_text(front, baselines).splitlines()
    assert heading.split()[:4] == ["FLOPs", "search", "validation", "change"]
    point = front.points[0]
    assert first.split()[1:7:3] == [f"{point.metric:.2f}", f"{point.metric - 1.5:.2f}"]
    assert summary.splits_line(front, baselines) == (
        "search: accuracy on the search split, 2,000 examples, where points were chosen; "
        "validation: on the validation split, 872 examples, which the search never saw"
    )


def test_a_study_that_is_not_yet_reported_says_no_more_than_it_knows(front):
    baselines = baselines_of(apart=True)  # the standard model is measured first, the front when the search has ended
    splits = summary.Splits.of(front, baselines)
    assert (splits.apart, splits.searched, splits.reported) == (True, 2000, None)
    (lossless,) = (row for row in summary.table(front, baselines) if row.name == "cheapest point without loss")
    assert (lossless.reported, lossless.change) == (None, None)


def test_a_metric_that_is_no_share_has_no_error_bars(front):
    other = replace(front, metric="f1")
    assert all(row.error is None for row in summary.table(other, BASELINES))
    assert "± one standard error" not in [trace.name for trace in figures.front_figure(other, BASELINES).data]


def test_the_table_says_when_nothing_is_without_loss(front):
    (row,) = (row for row in summary.table(front, baselines_of(99.0)) if row.name == "cheapest point without loss")
    assert (row.metric, row.note) == (None, "no point reaches the standard model's 99.00")


def test_the_table_needs_neither_baselines_nor_points(front):
    assert [row.name for row in summary.table(front)] == ["best point", "smallest point"]
    assert summary.table(Front.from_points([], "accuracy", 64)) == []


@pytest.mark.parametrize("limit", [5, 1000])
def test_terminal_tables_show_both_ends_and_the_point_without_loss(front, limit):
    text = summary.front_text(front, BASELINES, limit=limit)
    lossless = summary.without_loss(front, BASELINES)
    lines = text.splitlines()
    assert len(lines) - 1 <= min(limit + 1, len(front))
    for point in (front.points[0], lossless, front.points[-1]):
        assert sum(f" {point.text}" in line for line in lines) == 1
    (marked,) = (line for line in lines if line.endswith("no loss"))
    assert lossless.text in marked
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary.front_table(front, BASELINES, limit=limit))
    shown = console.export_text()
    assert all(line.split()[0] in shown for line in lines)


def test_the_plot_of_characters_rises_from_left_to_right(front):
    lines = summary.front_plot(front, width=40, height=8).splitlines()
    rows = [line.partition("┤")[2] for line in lines[:8]]
    assert rows[-1][0] == "●"
    assert rows[0][39] == "●"
    firsts = [row.index("●") for row in rows if "●" in row]
    assert firsts == sorted(firsts, reverse=True)
    assert summary.front_plot(Front.from_points([], "accuracy", 64)) == ""


# ---------------------------------------------------------------------- figures


def test_reported_values_have_a_figure_of_their_own(front, apart):
    assert figures.reported_figure(front, BASELINES) is None
    chosen, baselines = apart
    figure = figures.reported_figure(chosen, baselines)
    points = trace(figure, "points of the front (± one standard error)")
    assert list(points.y) == [point.reported for point in chosen.points]
    assert list(points.error_y.array) == [standard_error(point.reported, 872) for point in chosen.points]
    assert points.mode == "markers"
    curve = trace(figure, "standard model, constant ratio")
    assert list(curve.y)[::-1] == [point.reported for point in baselines.standard]
    assert figure.layout.yaxis.title.text == "accuracy (%), validation split"
    searched = figures.front_figure(chosen, baselines)
    assert searched.layout.yaxis.title.text == "accuracy (%), search split"
    assert list(trace(searched, "Pareto front").y) == [point.metric for point in chosen.points]
    assert set(figures.study_figures(chosen, baselines)) == {"front", "reported", "auc", "lengths"}


def test_a_band_shows_the_standard_error(front):
    low, high = (t for t in figures.front_figure(front, BASELINES).data if t.name == "± one standard error")
    for point, below, above in zip(front.points, low.y, high.y, strict=True):
        assert above - point.metric == pytest.approx(standard_error(point.metric, 872), abs=1e-3)
        assert point.metric - below == pytest.approx(standard_error(point.metric, 872), abs=1e-3)


def test_of_very_many_trials_some_are_drawn():
    front = front_of(stand_in_study(1500))
    beaten = len(front.evaluated) - len(front)
    drawn = figures.front_figure(front).data[0]
    assert len(drawn.x) <= figures.MOST_TRIALS < beaten
    assert drawn.name == f"other trials ({len(drawn.x):,} of {beaten:,})"


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def test_the_front_figure_shows_the_front_all_trials_and_both_models(front):
    figure = figures.front_figure(front, BASELINES)
    line = trace(figure, "Pareto front")
    assert list(line.y) == [point.metric for point in front.points]
    assert list(line.x) == pytest.approx([point.cost for point in front.points], abs=1e-5)
    assert len(trace(figure, "other trials").x) == len(front.evaluated) - len(front)
    assert line.line.shape == "hv"  # a budget buys the best point to its left
    for point, text in zip(front.points, line.text, strict=True):
        assert text == f"{point.text}<br>trial {point.number}, generation {point.generation}, mutation"
    for name, curve in (("standard", BASELINES.standard), ("length-adaptive", BASELINES.length_adaptive)):
        shown = trace(figure, f"{name} model, constant ratio")
        assert sorted(shown.y, reverse=True) == [point.metric for point in curve]
    assert figure.layout.xaxis.title.text == "FLOPs relative to the dense model"
    assert figure.layout.yaxis.title.text == "accuracy (%), validation split"
    assert figures.front_figure(front).layout.yaxis.title.text == "accuracy (%)"  # nobody says which split


def test_extrapolated_points_are_drawn_apart(study):
    low = Front.of(study).points[3].cost
    figure = figures.front_figure(Front.of(study, low=low))
    assert max(trace(figure, "below the trained range").x) < low
    assert min(trace(figure, "Pareto front").x) == pytest.approx(low, abs=1e-5)


def test_the_area_figure_ends_at_the_area_of_the_front(front):
    figure = figures.auc_figure(front)
    assert figure.data[0].y[-1] == pytest.approx(area_under(front.pairs, LOW))
    assert list(figure.data[0].y) == sorted(figure.data[0].y)
    assert figure.data[0].customdata[-1][0] == 60


def test_the_lengths_figure_has_a_row_a_point(front):
    (heat,) = figures.lengths_figure(front).data
    assert [tuple(row) for row in heat.z] == [point.lengths for point in front.points]


def test_latency_is_drawn_where_it_was_measured(front):
    assert figures.latency_figure(front) is None
    measured = front_of(stand_in_study(20, directions=("maximize", "minimize", "minimize")))
    figure = figures.latency_figure(measured)
    assert list(figure.data[0].y) == [point.extra["latency_ms"] for point in measured.evaluated]


def test_several_studies_share_a_figure(front):
    figure = figures.compare_figure({"a": front, "b<": front})
    assert [trace.name for trace in figure.data] == ["a", "b&lt;"]


def test_figures_are_small_enough_for_the_dashboard(front):
    for figure in (figures.front_figure(front, BASELINES), figures.auc_figure(front), figures.lengths_figure(front)):
        assert len(figure.to_json()) < 20_000


def test_pictures_need_an_exporter_and_say_so(front, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ValueError, match=r"front\.png: .*pip install kaleido.*[Ww]rite \.html instead"):
        figures.export_figure(figures.auc_figure(front), tmp_path / "front.png")


def test_pictures_need_a_browser_and_say_so(front, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    with pytest.raises(ValueError, match=r"front\.svg: .*finds no Chrome or Chromium: install one .*BROWSER_PATH"):
        figures.export_figure(figures.auc_figure(front), tmp_path / "front.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.browser
def test_figures_become_pictures(front, tmp_path, chromium, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(CHROMIUM))
    drawn = {"front": figures.front_figure(front, BASELINES), "auc": figures.auc_figure(front)}
    paths = figures.export_figures(drawn, tmp_path / "pictures", "svg")
    assert [path.name for path in paths] == ["front.svg", "auc.svg"]
    root = ElementTree.parse(paths[0]).getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"FLOPs relative to the dense model", "accuracy (%), validation split"} <= texts


def test_a_figure_alone_is_a_page_without_network(front, tmp_path):
    path = figures.export_figure(figures.auc_figure(front), tmp_path / "auc.html")
    assert loads(path.read_text()) == []
    with pytest.raises(ValueError, match=r"\.html, \.png, \.svg or \.pdf"):
        figures.export_figure(figures.auc_figure(front), tmp_path / "auc.gif")


# ---------------------------------------------------------------------- kept words


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (((True, True),), "layer 1 has 2 flags for 3 tokens"),
        (((True, True, False), (True, True, True)), "layer 2 keeps a token that layer 1 dropped"),
    ],
)
def test_kept_words_are_checked(kept, message):
    with pytest.raises(ValueError, match=message):
        report.KeptWords(("a", "b", "c"), kept)


# ---------------------------------------------------------------------- the page


class Loads(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (name in ("src", "srcset", "data") or (tag == "link" and name == "href")) and value != "data:,":
                self.urls.append(value)


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    style = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    return parser.urls + re.findall(r"@import|url\(", style)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_everything_and_loads_nothing(study, front, tmp_path):
    path = report.write_report(tmp_path / "r.html", study, BASELINES, front=front, words=[WORDS], about={"wall": "5 s"})
    page = path.read_text()
    assert loads(page) == []
    assert [point["text"] for point in data_of(page)["points"]] == [point.text for point in front.points]
    assert set(data_of(page)["figures"]) == {"front", "auc", "lengths"}
    lossless = summary.without_loss(front, BASELINES)
    assert data_of(page)["lossless"] == front.points.index(lossless)
    for fact in ("training 42, search 0", "2 workers", "real lengths", "5 s", f"torch {report._versions()['torch']}"):
        assert fact in page
    assert "Measured on the validation split, 872 examples. Standard error: 1.02 points at the best point" in page
    assert "its points flatter themselves" in page
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_nothing_that_people_wrote_is_taken_for_html(tmp_path):
    study = stand_in_study(5, name="</script><img src=x onerror=alert(1)>")
    about = {"<i>key": "</script><script>alert(2)</script>"}
    page = report.write_report(
        tmp_path / "r.html", study, BASELINES, words=[WORDS], about=about, study_file="</script>.yaml"
    ).read_text()
    assert loads(page) == []
    assert html.escape(study.study_name) in page
    assert "MiniLM &lt;small&gt; on SST-2 &amp; friends" in page
    assert '<span class="gone">&lt;b&gt;</span>' in page
    assert page.count("</script>") == 3
    assert "</script>.yaml" in data_of(page)["command"]


def test_word_pieces_join_and_dropped_ones_fade(study, tmp_path):
    page = report.write_report(tmp_path / "r.html", study, words=[WORDS]).read_text()
    assert "<span>un</span><span>hurried</span>" in page
    assert '<span class="gone">un</span><span>hurried</span>' in page


def test_that_the_dense_model_loses_nothing_is_no_news(study, front, tmp_path):
    dense = front.points[-1]
    assert dense.cost == 1
    page = report.write_report(tmp_path / "r.html", study, baselines_of(dense.metric), front=front).read_text()
    assert "are enough for" not in page
    assert f"{len(front)} operating points: from {front.points[0].metric:.2f} % accuracy at" in page


@pytest.mark.parametrize("baselines", [None, BASELINES, Baselines("accuracy", standard=(Measured(99.0),))])
def test_a_page_needs_no_baselines(study, tmp_path, baselines):
    page = report.write_report(tmp_path / "r.html", study, baselines).read_text()
    assert ('id="tile-change"' in page) == (baselines is not None)


def test_an_empty_study_has_a_page_that_says_so(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    page = report.write_report(tmp_path / "r.html", study, BASELINES, n_trials=60).read_text()
    assert "No configuration has been evaluated yet" in page
    assert "0 of 60 trials" in page
    assert data_of(page)["points"] == []


def test_a_running_study_has_a_page_that_says_so(tmp_path):
    study = stand_in_study(20)
    study.enqueue_trial({f"length_0{layer}": 64 for layer in range(1, LAYERS + 1)})
    study.ask({f"length_0{layer}": IntDistribution(1, MAX_LENGTH) for layer in range(1, LAYERS + 1)})
    page = report.write_report(tmp_path / "r.html", study, n_trials=60).read_text()
    assert "This study is still running (20 of 60 trials, 1 under way)" in page
    assert (
        "stopped short of its trials"
        in report.write_report(tmp_path / "r.html", stand_in_study(20), n_trials=60).read_text()
    )


def test_lost_claims_are_no_failures():
    study = stand_in_study(3)
    for reason in ("lost claim", "handed back", "died: worker a"):
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"fail": reason}))
    assert str(summary.Progress.of(study, 3)) == "3 of 3 trials, 1 failed"


def test_pruned_trials_are_counted_and_no_part_of_the_front(tmp_path):
    study = stand_in_study(20)
    before = Front.of(study)
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED,
            params=study.trials[0].params,
            distributions=study.trials[0].distributions,
            user_attrs={"pruned": {"examples": 128, "metric": 99.0}, "generation": 1, "operation": "mutation"},
        )
    )
    assert str(summary.Progress.of(study, 60)) == "21 of 60 trials, 1 of them pruned"
    assert Front.of(study) == before
    page = report.write_report(tmp_path / "r.html", study, n_trials=21).read_text()
    assert "21 of 21 trials, 1 of them pruned" in page


def test_three_objectives_are_named_and_one_left_out(tmp_path):
    study = stand_in_study(20, directions=("maximize", "minimize", "minimize"))
    page = report.write_report(tmp_path / "r.html", study).read_text()
    assert "This study has 3 objectives. The front shown is that of accuracy against FLOPs; latency_ms can be" in page
    assert "latency" in data_of(page)["figures"]


def test_one_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a metric to maximise, then a cost"):
        report.write_report(tmp_path / "r.html", optuna.create_study())
    assert list(tmp_path.iterdir()) == []


def test_two_thousand_trials_stay_under_eight_megabytes(tmp_path):
    study = stand_in_study(2000)
    path = report.write_report(tmp_path / "r.html", study, BASELINES, front=front_of(study), words=[WORDS] * 3)
    assert path.stat().st_size < 8e6


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page_file(study, front, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report.write_report(
        path, study, BASELINES, front=front, n_trials=60, study_file="s.yaml", checkpoint="runs/s", words=[WORDS]
    )


@pytest.mark.browser
def test_the_budget_chooses_the_point(page_file, front, browse):
    with browse() as page:
        page.goto(page_file.as_uri())
        assert page.text_content("#chosen-config") == summary.without_loss(front, BASELINES).text
        for budget in (0.45, 0.6, 0.9):
            page.fill("#budget", str(budget))
            point = front.pick(budget=budget)
            assert page.text_content("#chosen-config") == point.text
            assert page.text_content("#tile-metric") == f"{point.metric:.2f} %"
            assert page.text_content("#tile-metric-error") == f"± {standard_error(point.metric, 872):.2f}"
            assert page.text_content("#tile-cost") == f"{point.cost:.3f}×"
            bars = page.locator("#bars b").all_text_contents()
            assert bars == [str(length) for length in point.lengths]
            assert page.text_content("#command") == f"lat-optuna front s.yaml --budget {budget}"
            assert f'load("runs/s", budget={budget})' in page.text_content("#python")
            page.wait_for_selector("#figure-front .main-svg")
            ring = page.evaluate("document.getElementById('figure-front').layout.shapes.at(-1)")
            assert (ring["xanchor"], ring["yanchor"], ring["visible"]) == (point.cost, point.metric, True)

        page.fill("#budget", page.get_attribute("#budget", "min"))
        assert page.is_hidden("#choice")
        assert not page.evaluate("document.getElementById('figure-front').layout.shapes.at(-1).visible")
        assert f"The smallest costs {front.points[0].cost:.4f}×" in page.text_content("#no-point")
        page.click("[data-pick=smallest]")
        assert page.is_visible("#choice")
        assert page.text_content("#chosen-config") == front.points[0].text
        page.click("[data-pick=best]")
        assert page.text_content("#chosen-config") == front.points[-1].text


@pytest.mark.browser
def test_a_clicked_point_is_chosen_and_its_command_means_it(page_file, front, browse):
    with browse(color_scheme="dark") as page:
        page.goto(page_file.as_uri())
        page.wait_for_selector("#figure-front .main-svg")
        for index, point in enumerate(front.points):
            page.evaluate(
                """index => {
                    const figure = document.getElementById("figure-front");
                    const curveNumber = figure.data.findIndex((trace) => trace.name === "Pareto front");
                    figure.emit("plotly_click", { points: [{ pointIndex: index, curveNumber }] });
                }""",
                index,
            )
            assert page.text_content("#chosen-config") == point.text
            budget = float(page.text_content("#command").split()[-1])
            assert front.pick(budget=budget) == point

        def brightness() -> float:
            color = page.evaluate("getComputedStyle(document.querySelector('#figure-front .xtitle')).fill")
            return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

        assert brightness() > 200
        page.emulate_media(media="print")
        assert brightness() < 60


@pytest.mark.browser
def test_figures_are_drawn_and_fit_a_phone(page_file, browse):
    with browse(viewport={"width": 360, "height": 740}) as page:
        page.goto(page_file.as_uri())
        page.wait_for_selector("#figure-front .main-svg")
        titles = page.locator("#figure-front .xtitle, #figure-front .ytitle").all_text_contents()
        assert titles == ["FLOPs relative to the dense model", "accuracy (%), validation split"]
        for name in ("auc", "lengths"):  # drawn when one gets there
            page.locator(f"#figure-{name}").scroll_into_view_if_needed()
            page.wait_for_selector(f"#figure-{name} .main-svg")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_an_empty_page_works(browse, tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    path = report.write_report(tmp_path / "r.html", study, BASELINES)
    with browse() as page:
        page.goto(path.as_uri())
        assert page.is_hidden("#chooser")
        page.wait_for_selector("#figure-front .main-svg")


@pytest.mark.browser
def test_a_budget_can_be_chosen_before_any_figure_is_there(browse, apart, tmp_path):
    front, baselines = apart
    study = stand_in_study(60)
    path = report.write_report(tmp_path / "r.html", study, baselines, front=front)
    path.write_text(re.sub(r'(id="plotly">).*(</script>)', r"\1\2", path.read_text(), flags=re.DOTALL))
    with browse(expected=["Plotly is not defined"]) as page:
        page.goto(path.as_uri())
        page.fill("#budget", "0.6")
        point = front.pick(budget=0.6)
        assert page.text_content("#chosen-config") == point.text
        assert page.text_content("#tile-metric") == f"{point.metric:.2f} %"
        assert page.text_content("#tile-reported") == f"{point.reported:.2f} %"
        assert page.text_content("#tile-reported-error") == f"± {standard_error(point.reported, 872):.2f}"
        assert page.text_content("#tile-change") == f"{point.reported - 86.0:+.2f}".replace("-", "−")


@pytest.mark.browser
def test_on_paper_all_figures_are_there(browse, page_file):
    with browse(viewport={"width": 800, "height": 600}) as page:
        page.goto(page_file.as_uri())
        page.wait_for_selector("#figure-front .main-svg")
        assert page.locator("#figure-lengths .main-svg").count() == 0
        page.pdf()
        assert page.locator("#figure-lengths .main-svg").count() > 0


def test_a_point_that_costs_more_than_the_dense_model_is_no_obstacle(tmp_path):
    front = Front.from_points([Point((64,) * 4, 90.0, 1.02), Point((32,) * 4, 80.0, 0.5)], "f1", 64)
    page = report.write_report(tmp_path / "r.html", stand_in_study(2), front=front).read_text()
    assert [point["cost"] for point in data_of(page)["points"]] == [0.5, 1.02]
