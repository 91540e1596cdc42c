"""Looking at studies with the command, and what a search shows while it runs: on studies that need no model."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import click
import optuna
import pytest
import yaml
from click.testing import CliRunner, Result
from optuna.distributions import IntDistribution
from optuna_dashboard import get_note
from stand_in_studies import EVALUATOR, LAYERS, MAX_LENGTH, P, baselines_of, stand_in_study

from lat_optuna import cli, pipeline, summary
from lat_optuna.search.front import Front, write_baselines
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.storage import open_storage
from lat_optuna.search.worker import Progress, Search
from lat_optuna.spec import StudySpec, load_spec


def study_file(folder: Path, name: str = "stand-in", n_trials: int = 60) -> Path:
    """A study file whose model and data are never asked for."""
    content = {
        "name": name,
        "model": {"checkpoint": "nowhere"},
        "task": {"type": "text_classification", "data": "nowhere"},
        "search": {"n_trials": n_trials},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    (folder / name).mkdir()
    return path


def searched(folder: Path, n_trials: int = 60, name: str = "stand-in", **kwargs) -> tuple[Path, optuna.Study]:
    """A study file and its study in a database."""
    path = study_file(folder, name)
    return path, stand_in_study(n_trials, name, open_storage(load_spec(path).storage), **kwargs)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


# ---------------------------------------------------------------------- points


def test_a_latency_picks_a_point(tmp_path):
    path, study = searched(tmp_path, directions=("maximize", "minimize", "minimize"))
    done = invoke("front", path, "--latency-ms", "6", "--json")
    (picked,) = json.loads(done.stdout)["points"]
    within = [point for point in Front.of(study).evaluated if point.extra["latency_ms"] <= 6]
    assert picked["accuracy"] == max(point.metric for point in within)
    assert picked["latency_ms"] <= 6
    slow = invoke("front", path, "--latency-ms", "0.1")
    assert (slow.exit_code, slow.stderr.count("\n")) == (1, 2)
    assert "no point runs within 0.1 ms; the fastest needs" in slow.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0.01"], "no point costs at most 0.01 of the dense model's FLOPs; the smallest costs "),
        (["--latency-ms", "20"], "no latencies were measured in this study; pick by a budget of FLOPs instead"),
        (["--no-loss"], "no point reaches 99.00 accuracy (99.00 of the dense model less 0); the best has"),
        (["--max-drop", "2"], "no point reaches 97.00 accuracy (99.00 of the dense model less 2); the best has"),
    ],
)
def test_a_condition_that_no_point_meets(tmp_path, options, message):
    path, _ = searched(tmp_path)
    write_baselines(tmp_path / "stand-in", baselines_of(99.0))
    done = invoke("front", path, *options)
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lat-optuna: {message}")


@pytest.mark.parametrize("options", [[], ["--budget", "0.5"]])
def test_an_empty_study_has_no_front_but_a_report(tmp_path, options):
    path, _ = searched(tmp_path, 0)
    done = invoke("front", path, *options)
    assert done.exit_code == 1
    assert done.stderr == (
        "lat-optuna: the front is empty: no configuration has been evaluated yet; run the search first\n"
    )
    assert json.loads(invoke("front", path, "--json").stdout)["points"] == []
    done = invoke("report", path)
    assert done.exit_code == 0
    assert "No configuration has been evaluated yet" in Path(done.stdout.strip()).read_text()


def test_a_running_study_is_shown_as_it_is(tmp_path):
    path, study = searched(tmp_path, 20)
    study.ask({f"length_0{layer}": IntDistribution(1, MAX_LENGTH) for layer in range(1, LAYERS + 1)})
    done = invoke("front", path)
    assert done.exit_code == 0
    assert done.stderr == "This study is still running (20 of 60 trials, 1 under way); this is how far it was.\n"
    assert Front.of(study).points[0].text in done.stdout
    done = invoke("report", path)
    assert "This study is still running (20 of 60 trials, 1 under way)" in Path(done.stdout.strip()).read_text()


def test_a_third_objective_is_named(tmp_path):
    path, _ = searched(tmp_path, directions=("maximize", "minimize", "minimize"))
    for done in (invoke("front", path), invoke("compare", path, "--output", tmp_path / "c.html")):
        assert done.exit_code == 0
        assert "has 3 objectives. The front shown is that of accuracy against FLOPs; latency_ms can be" in done.stderr
    done = invoke("report", path)
    assert "This study has 3 objectives" in Path(done.stdout.strip()).read_text()


def test_one_objective_is_refused(tmp_path):
    path = study_file(tmp_path)
    optuna.create_study(study_name="stand-in", storage=open_storage(load_spec(path).storage))
    for verb in ("front", "report", "compare"):
        done = invoke(verb, path)
        assert done.exit_code == 1
        assert done.stderr.startswith(
            "lat-optuna: study 'stand-in' has the objectives minimize; a front needs a metric"
        )


# ---------------------------------------------------------------------- several studies, figures as files


def test_studies_are_compared_in_a_table_and_in_one_page(tmp_path):
    first, study = searched(tmp_path)
    second, _ = searched(tmp_path, 30, "other")
    third = study_file(tmp_path, "empty")
    optuna.create_study(
        study_name="empty", storage=open_storage(load_spec(third).storage), directions=["maximize", "minimize"]
    )
    write_baselines(tmp_path / "stand-in", baselines_of())
    page = tmp_path / "compare.html"
    done = invoke("compare", first, second, third, "--output", page)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    lossless = summary.without_loss(Front.of(study), baselines_of())
    (line,) = (line for line in lines if "cheapest point without loss" in line)
    assert line.startswith("stand-in")
    assert line.endswith(lossless.text)
    assert sum(line.startswith("other") for line in lines) == 2  # without baselines: both ends of the front
    assert sum(line.startswith("empty") for line in lines) == 1
    assert lines[-1] == str(page)
    assert "other: This study has stopped short of its trials (30 of 60 trials).\n" in done.stderr
    content = page.read_text()
    assert all(f'"name":"{name}"' in content for name in ("stand-in", "other", "empty"))
    assert "src=" not in content.split("<body>")[1].split("plotly.js")[0]


def test_a_study_is_compared_with_others_only(tmp_path):
    path, _ = searched(tmp_path)
    done = invoke("compare", path, path)
    assert done.exit_code == 2
    assert "a study is named twice" in done.stderr


def test_figures_as_files(tmp_path, monkeypatch):
    path, _ = searched(tmp_path)
    folder = tmp_path / "figures"
    done = invoke("report", path, "--figures", folder, "--format", "html")
    assert done.exit_code == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["auc.html", "front.html", "lengths.html"]
    monkeypatch.setitem(sys.modules, "kaleido", None)
    done = invoke("report", path, "--figures", folder, "--format", "png")
    assert done.exit_code == 1
    assert "front.png: plotly exports png through kaleido" in done.stderr
    assert "pip install kaleido" in done.stderr
    assert not list(folder.glob("*.png"))
    assert invoke("report", path, "--figures", folder, "--format", "gif").exit_code == 2


# ---------------------------------------------------------------------- while a search runs


@pytest.fixture
def spec(tmp_path, monkeypatch) -> StudySpec:
    """A study whose search measures nothing, in this process."""
    spec = load_spec(study_file(tmp_path, n_trials=12))
    plan = SearchPlan(LAYERS, MAX_LENGTH, p=P, cost=EVALUATOR.cost, num_initial=4, num_mutations=4, num_crossovers=4)
    search = Search(spec.storage, spec.name, lambda device: EVALUATOR, lambda evaluator: plan, spec.search.n_trials)
    monkeypatch.setattr(pipeline, "search_of", lambda spec: search)
    return spec


def note_of(spec: StudySpec) -> str:
    return get_note(optuna.load_study(study_name=spec.name, storage=spec.storage))


def test_a_search_keeps_its_note_current_and_survives_a_failure_to(spec, monkeypatch, caplog):
    publish, notes = pipeline.publish, []

    def watched(spec: StudySpec) -> None:
        notes.append("")
        if len(notes) == 3:
            raise OSError("no space left")
        publish(spec)
        notes[-1] = note_of(spec)

    monkeypatch.setattr(pipeline, "publish", watched)
    monkeypatch.setattr(pipeline, "PUBLISH_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "SHARE_OF_TIME", 1e9)
    told: list[Progress] = []
    with caplog.at_level(logging.WARNING):
        ended = pipeline.search(spec, ["cpu"], told.append)
    assert ended.done == 12
    assert "could not be brought up to date: no space left" in caplog.text
    assert "- Search: running, 0 of 12 trials, 1 under way" in notes[0]
    assert "- Search: running, 5 of 12 trials, 1 under way" in notes[5]
    assert "- Search: finished, 12 of 12 trials" in notes[-1]
    _, front, _ = pipeline.load_front(spec)
    assert list(told[-1].front) == front.pairs
    assert told[-1].auc == pytest.approx(front.auc())


def test_a_failed_search_ends_with_its_own_error(spec, monkeypatch):
    def broken(spec: StudySpec) -> None:
        raise OSError("no space left")

    def failing(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pipeline, "publish", broken)
    monkeypatch.setattr("lat_optuna.search.worker.launch", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        pipeline.search(spec, ["cpu"])


def test_of_several_workers_the_one_that_finished_last_publishes(spec, monkeypatch):
    published = []
    monkeypatch.setattr(pipeline, "publish", published.append)
    assert pipeline.join(spec, "cpu").here == 12
    assert published == [spec]
    assert pipeline.join(spec, "cpu").here == 0  # it came too late to have done anything
    assert published == [spec]
    study = optuna.load_study(study_name=spec.name, storage=spec.storage)
    study.add_trial(stand_in_study(1).trials[0])  # another worker's, and the last
    assert not pipeline._finished_last(spec)


def test_progress_shows_the_cheapest_point_without_loss(tmp_path, capsys):
    spec = load_spec(study_file(tmp_path))
    front = ((86.0, 0.4), (87.0, 0.55), (88.0, 0.7))
    now = Progress(3, 60, 1, 0, auc=86.5, rate=1.0, seconds_left=57.0, front=front)
    with click.Context(cli.main), cli._search_progress(spec, baselines_of(87.0)) as tell:
        tell(now)
    assert "search: 3/60 trials" in (line := capsys.readouterr().err)
    assert "AUC 86.5  no loss 0.550x" in line
    with click.Context(cli.main), cli._search_progress(spec, baselines_of(99.0)) as tell:
        tell(now)
    assert "no loss" not in capsys.readouterr().err
