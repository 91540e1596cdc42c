"""A study of a real, if tiny, model from training to the browser: the report, and optuna-dashboard."""

from __future__ import annotations

import json
import threading
import urllib.request

import pytest
from tiny_text import sentences, tiny_checkpoint, write_parquet

from lat_optuna import dashboard, pipeline, summary
from lat_optuna.spec import StudySpec


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> StudySpec:
    """A finished study whose search had a split of its own and selected by something else than the metric."""
    folder = tmp_path_factory.mktemp("real")
    write_parquet(folder / "data" / "train.parquet", sentences(96))
    write_parquet(folder / "data" / "validation.parquet", sentences(40, seed=1))
    spec = StudySpec.model_validate(
        {
            "name": "tiny",
            "model": {"checkpoint": tiny_checkpoint(folder / "checkpoint")},
            "task": {
                "type": "text_classification",
                "data": str(folder / "data"),
                "max_length": 16,
                "search_rows": 24,
            },
            "training": {"batch_size": 8, "epochs": 1, "adaptive_epochs": 1, "p": 0.4, "precision": "fp32"},
            "search": {
                "n_trials": 14,
                "num_initial": 6,
                "num_mutations": 4,
                "num_crossovers": 4,
                "metric": "probability",
            },
            "output": str(folder / "out"),
        }
    )
    pipeline.train(spec)
    pipeline.measure_standard(spec)
    pipeline.search(spec, ["cpu"])
    pipeline.report(spec, study_file="tiny.yaml")
    return spec


def test_the_report_says_what_was_run(spec):
    page = (spec.output / "report.html").read_text()
    _, front, baselines = pipeline.load_front(spec)
    searched, reported = front.examples["search"], front.examples["reported"]
    assert f"searched on the search split, {searched} examples by probability; reported on the validation split" in page
    assert f"{reported} examples" in page
    for fact in ("training 42, search 0", "p = 0.4", "real lengths, relative retention", "torch ", baselines.hardware):
        assert fact in page
    assert "<dt>training time</dt>" in page
    assert page.count('class="layer"') == 1 + 3  # the input of one text, and what each layer left of it


@pytest.mark.browser
def test_the_report_of_a_real_study_shows_the_point_of_a_budget(spec, browse):
    _, front, baselines = pipeline.load_front(spec)
    splits = summary.Splits.of(front, baselines)
    costs = [point.cost for point in front.points]
    assert len(costs) >= 3
    with browse() as page:
        page.goto((spec.output / "report.html").as_uri())
        for budget in (costs[0] + 0.01, costs[len(costs) // 2] + 0.01, 1.0):
            page.fill("#budget", f"{budget:.3f}")
            shown = float(page.input_value("#budget"))
            point = front.pick(budget=shown)
            assert page.text_content("#chosen-config") == point.text
            assert page.text_content("#tile-metric") == f"{point.metric:.2f} %"
            assert page.text_content("#tile-reported") == f"{point.reported:.2f} %"
            error = splits.error("accuracy", point.reported, reported=True)
            assert page.text_content("#tile-reported-error") == f"± {error:.2f}"
            assert page.text_content("#command") == f"lat-optuna front tiny.yaml --budget {shown:g}"
        page.wait_for_selector("#figure-front .main-svg")
        titles = page.locator("#figure-front .xtitle, #figure-front .ytitle").all_text_contents()
        assert titles == ["FLOPs relative to the dense model", "accuracy (%), search split"]


@pytest.fixture
def served(spec):
    (server,) = dashboard.make_servers([spec.storage], port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield dashboard.address(server)
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_trial_says_what_it_is(spec, served):
    with urllib.request.urlopen(served.removesuffix("/dashboard") + "/api/studies/1") as answer:
        detail = json.load(answer)
    assert detail["objective_names"] == ["accuracy", "flops_ratio"]
    assert detail["directions"] == ["maximize", "minimize"]
    assert len(detail["trials"]) == 14
    for trial in detail["trials"]:
        attributes = {entry["key"]: entry["value"] for entry in trial["user_attrs"]}
        lengths = [str(entry["param_external_value"]) for entry in trial["params"]]
        assert attributes["config"] == "-".join(lengths)
        assert {"operation", "parents", "generation", "device"} <= attributes.keys()
        assert "seconds" in attributes["details"]


@pytest.mark.browser
def test_the_dashboard_of_a_real_study_shows_objectives_note_and_figures(served, browse):
    with browse(viewport={"width": 1300, "height": 1000}) as page:
        page.goto(f"{served}/studies/1")
        for name, titles in {
            "front": ["FLOPs relative to the dense model", "accuracy (%), search split"],
            "reported": ["FLOPs relative to the dense model", "accuracy (%), validation split"],
            "area-under-the-front": ["generation (0: initial population)"],
            "lengths": ["layer", "FLOPs of the point"],
        }.items():
            place = f"[id='user-defined-plot:{name}']"
            page.wait_for_selector(f"{place} .xtitle", timeout=120_000)
            shown = page.locator(f"{place} :is(.xtitle, .ytitle)").all_text_contents()
            assert shown[: len(titles)] == titles
        assert page.get_by_text("flops_ratio").count() > 0
        page.goto(f"{served}/studies/1/note")
        page.wait_for_selector("table", timeout=120_000)
        assert "accuracy (%), validation" in page.text_content("table")
        assert "smallest point" in page.text_content("table")
        assert page.get_by_text("14 of 14 trials").count() == 1
