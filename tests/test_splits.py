"""A search selects on its own split; what people are told was measured on another one, once, when it had ended."""

from __future__ import annotations

import pytest
import torch
from tiny_text import sentences, tiny_checkpoint, write_parquet

from lat_optuna import pipeline
from lat_optuna.model import adapt
from lat_optuna.model.checkpoint import SideFile, read_side_file, write_side_file
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.search.front import Front, read_baselines
from lat_optuna.search.study import load_study
from lat_optuna.spec import StudySpec


def make_spec(folder, *, search_rows: int | None = 30, **search) -> StudySpec:
    """A study whose models are there, untrained: how good they are is of no consequence here."""
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    write_parquet(folder / "data" / "train.parquet", sentences(120))
    write_parquet(folder / "data" / "validation.parquet", sentences(40, seed=1))
    spec = StudySpec.model_validate(
        {
            "name": "splits",
            "model": {"checkpoint": checkpoint},
            "task": {
                "type": "text_classification",
                "data": str(folder / "data"),
                "max_length": 16,
                "search_rows": search_rows,
            },
            "training": {"p": 0.4},
            "search": {"n_trials": 12, "num_initial": 4, "num_mutations": 4, "num_crossovers": 4, **search},
            "output": str(folder / "out"),
        }
    )
    task = pipeline.make_task(spec)
    for place in (spec.standard_folder, spec.adaptive_folder):
        task.build_model(checkpoint).save_pretrained(place)
        task.tokenizer.save_pretrained(place)
    write_side_file(spec.adaptive_folder, SideFile(num_layers=3, max_length=16))
    return spec


def measured(spec: StudySpec, split: str, config):
    model = adapt(pipeline.make_task(spec).build_model(str(spec.adaptive_folder)))
    return ModelEvaluator(model, pipeline.make_task(spec), split, agreement=True).evaluate(config)


@pytest.mark.parametrize("metric", ["metric", "probability", "agreement"])
def test_the_front_is_chosen_on_one_split_and_reported_on_another(tmp_path, metric):
    spec = make_spec(tmp_path, metric=metric)
    assert spec.search_split == "search"
    pipeline.measure_standard(spec)
    pipeline.search(spec, ["cpu"])
    study, front, baselines = pipeline.load_front(spec)
    plan = pipeline.make_plan(spec, pipeline.MakeEvaluator(spec)("cpu"))
    for point in front.points:
        config = plan.full if len(set(point.lengths)) == 1 and point.cost == 1 else None
        config = config or type(plan.full)(point.lengths, 16)
        on_search, reported = measured(spec, "search", config), measured(spec, "validation", config)
        assert point.metric == pytest.approx(on_search.metric)
        assert point.score == pytest.approx(on_search.score(metric), abs=1e-4)
        assert point.reported == pytest.approx(reported.metric)
    for better, worse in zip(front.points[1:], front.points, strict=False):
        assert better.score > worse.score
    counts = {"search": len(pipeline.make_task(spec).features("search")), "reported": 40}
    assert dict(front.examples) == study.user_attrs["examples"] == counts
    assert 30 <= counts["search"] < 40
    assert baselines is not None
    assert all(point.reported is not None for point in (*baselines.standard, *baselines.length_adaptive))
    assert baselines == read_baselines(spec.output)
    side = read_side_file(spec.adaptive_folder)
    assert side is not None
    assert [point.extra["reported"] for point in side.front] == [point.reported for point in front.points]
    again = Front.of_side_file(side, front.low)
    assert [(p.score, p.reported) for p in again.points] == [(p.score, p.reported) for p in front.points]


def test_nothing_is_reported_twice(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    pipeline.search(spec, ["cpu"])
    study = load_study(spec.storage, spec.name)
    reported = study.user_attrs["reported"]
    gone = next(iter(reported))
    study.set_user_attr("reported", {text: values for text, values in reported.items() if text != gone})
    asked = []
    evaluate = ModelEvaluator.evaluate
    monkeypatch.setattr(
        ModelEvaluator, "evaluate", lambda self, config: asked.append(str(config)) or evaluate(self, config)
    )
    pipeline.measure_reported(spec)
    assert asked == [gone]
    assert load_study(spec.storage, spec.name).user_attrs["reported"] == reported
    pipeline.measure_reported(spec)
    assert asked == [gone]


def test_without_a_search_split_there_is_one_value(tmp_path):
    spec = make_spec(tmp_path, search_rows=None, metric="metric")
    assert spec.search_split == "validation"
    pipeline.measure_standard(spec)
    pipeline.search(spec, ["cpu"])
    study, front, baselines = pipeline.load_front(spec)
    assert {"reported", "examples", "search_metric"}.isdisjoint(study.user_attrs)
    assert all(point.reported is None and point.score == point.metric for point in front.points)
    assert baselines is not None
    assert all(point.reported is None for point in baselines.standard)
    assert baselines.examples == 40


def test_what_a_reduced_precision_or_compiling_changes_is_measured_and_kept(tmp_path, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend="eager", **options))
    spec = make_spec(tmp_path, precision="bf16")
    pipeline.search(spec, ["cpu"])
    values = load_study(spec.storage, spec.name).user_attrs["precision"]
    assert values["dense"]["fp32"] == pytest.approx(measured(spec, "validation", None).metric)
    assert set(values["smallest"]) == {"fp32", "bf16"}
    compiled = make_spec(tmp_path / "compiled", compiled=True)
    pipeline.search(compiled, ["cpu"])
    values = load_study(compiled.storage, compiled.name).user_attrs["precision"]
    assert set(values["smallest"]) == {"fp32", "fp32, compiled"}
    exact = make_spec(tmp_path / "exact")
    pipeline.search(exact, ["cpu"])
    assert "precision" not in load_study(exact.storage, exact.name).user_attrs


def test_studies_that_select_by_different_things_are_not_mixed(tmp_path):
    spec = make_spec(tmp_path, metric="metric")
    pipeline.search(spec, ["cpu"])
    other = spec.model_copy(update={"search": spec.search.model_copy(update={"metric": "probability", "n_trials": 20})})
    with pytest.raises(ValueError, match="metric is 'not set' there and 'probability' here"):
        pipeline.search(other, ["cpu"])
