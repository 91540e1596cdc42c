"""The paper's experiments on a tiny study: every part leaves rows, nothing is done twice, seeds lie side by side."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_text import sentences, tiny_checkpoint, write_parquet

from lat_optuna.cli import main
from lat_optuna.length_config import LengthConfig
from lat_optuna.pipeline import pretrained
from lat_optuna.reproduce import ABLATIONS, constant_ratio_within, table
from lat_optuna.search.plan import SearchPlan
from lat_optuna.spec import SpecError, load_spec


def make_study(folder: Path, **model) -> Path:
    write_parquet(folder / "data" / "train.parquet", sentences(120))
    write_parquet(folder / "data" / "validation.parquet", sentences(40, seed=1))
    content = {
        "name": "tiny",
        "model": {"checkpoint": tiny_checkpoint(folder / "checkpoint"), **model},
        "task": {
            "type": "text_classification",
            "data": str(folder / "data"),
            "max_length": 16,
            "search_rows": 30,
            "test_rows": 20,
        },
        "training": {"batch_size": 16, "epochs": 1, "adaptive_epochs": 1, "p": 0.8},
        "search": {"n_trials": 8, "num_initial": 4, "num_mutations": 2, "num_crossovers": 2},
        "output": str(folder / "out"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["--debug", "reproduce", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study with all of its parts, and the folder of its results."""
    folder = tmp_path_factory.mktemp("reproduce")
    study = make_study(folder)
    done = run(study, "--results", folder / "results", "--figures", folder / "figures")
    assert done.exit_code == 0, done.output
    return folder, study, done.output


def rows_of(folder, seed=42):
    rows = json.loads((folder / "results" / "tiny" / f"seed-{seed}.json").read_text())["rows"]
    return {(row["protocol"], row["name"]): row for row in rows}


def test_both_protocols_have_the_rows_of_table_1(whole):
    folder, _, _ = whole
    rows = rows_of(folder)
    for protocol in ("real lengths, relative", "padded, absolute"):
        standard = rows[protocol, "standard"]
        assert standard["cost"] == 1
        assert standard["metrics"].keys() == {"search", "validation", "test"}
        best, smallest = rows[protocol, "length-adaptive, most accurate"], rows[protocol, "length-adaptive, smallest"]
        assert smallest["cost"] <= best["cost"]
        lossless = rows.get((protocol, "length-adaptive, cheapest without loss"))
        if lossless is not None:
            assert lossless["metrics"]["search"] >= standard["metrics"]["search"]
            assert lossless["cost"] <= best["cost"]
    # Nothing is dropped and nothing depends on padding: dense models predict the same under both.
    both = [rows[protocol, "standard"]["metrics"] for protocol in ("real lengths, relative", "padded, absolute")]
    assert both[0] == both[1]


def test_every_way_to_train_and_to_choose_is_compared_at_the_same_budgets(whole):
    folder, _, _ = whole
    rows = {name: row for (protocol, name), row in rows_of(folder).items() if protocol == "real lengths, relative"}
    for budget in ("0.5x", "0.35x"):
        fixed = rows[f"one model for {budget} alone (PoWER-BERT)"]
        assert fixed["config"] == rows[f"length-adaptive, constant ratio, within {budget}"]["config"]
        assert fixed["config"] == rows[f"standard, constant ratio, within {budget}"]["config"]
        assert f"length-adaptive, searched, within {budget}" in rows
        assert f"random configurations, best within {budget}" in rows
    assert rows["standard, trained as long as the length-adaptive"]["cost"] == 1
    for name in ABLATIONS:
        assert {f"{name}, {where}" for where in ("dense", "0.5x", "0.35x", "smallest")} <= rows.keys()


def test_variants_are_trained_in_other_ways(whole):
    folder, _, _ = whole
    weights = {path.parent.name: path.read_bytes() for path in (folder / "out").glob("*/model.safetensors")}
    assert len(weights) == 2 + 3 + len(ABLATIONS)
    assert len(set(weights.values())) == len(weights)
    side = json.loads((folder / "out" / "variant-without-layerdrop" / "length_adaptive.json").read_text())
    assert side["training"]["layer_drop"] == 0
    assert not (folder / "out" / "variant-fixed-0.5" / "length_adaptive.json").exists()


def test_a_second_run_does_nothing_twice_and_finds_the_same(whole):
    folder, study, text = whole
    files = sorted((folder / "out").glob("*/model.safetensors"))
    before = [path.stat().st_mtime_ns for path in files], rows_of(folder)
    measured = (folder / "out" / "measured.json").read_text()
    again = run(study, "--results", folder / "results")
    assert again.exit_code == 0, again.output
    assert ([path.stat().st_mtime_ns for path in files], rows_of(folder)) == before
    assert (folder / "out" / "measured.json").read_text() == measured
    assert "| standard | 1.000x |" in text


def test_the_figures_numbers_are_kept(whole):
    folder, _, _ = whole
    results = folder / "results" / "tiny"
    with (results / "seed-42-figure2.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert {row["curve"] for row in curves} == {
        "standard, constant ratio",
        "length-adaptive, constant ratio",
        "length-adaptive, searched",
    }
    assert all(row["reported"] for row in curves)
    with (results / "seed-42-figure3.csv").open() as file:
        batches = {row["batch_size"] for row in csv.DictReader(file)}
    assert batches == {"1", "4", "16", "64"}
    with (results / "seed-42-figure4.csv").open() as file:
        areas = [float(row["auc"]) for row in csv.DictReader(file)]
    assert areas == sorted(areas)
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "figure2.html",
        "figure3.html",
        "figure4.html",
    ]


def test_seeds_are_studies_of_their_own_and_the_table_gives_their_spread(whole):
    folder, study, _ = whole
    before = rows_of(folder)
    skipped = [option for part in ("padded", "random", "fixed", "ablations", "latency") for option in ("--skip", part)]
    done = run(study, "--results", folder / "results", "--seeds", "42,7", *skipped)
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "seed-7" / "length_adaptive" / "model.safetensors").exists()
    metrics = [rows_of(folder, seed)["real lengths, relative", "standard"]["metrics"]["test"] for seed in (42, 7)]
    mean = sum(metrics) / 2
    line = next(line for line in done.output.splitlines() if line.startswith("| standard |"))
    assert f"{mean:.2f} ± {abs(metrics[0] - metrics[1]) / 2**0.5:.2f}" in line
    assert "Seeds: 42, 7" in done.output
    names = {json.loads(path.read_text())["study"] for path in (folder / "results" / "tiny").glob("seed-*.json")}
    assert names == {"tiny"}
    assert rows_of(folder) == before  # what is skipped now was measured then, and stays


def test_the_table_names_the_seeds_of_a_row_that_not_all_have(tmp_path):
    about = {"examples": {"validation": 10}, "data": "some", "hardware": "cpu", "Training": "short"}
    row = {"protocol": "real lengths, relative", "config": "dense", "cost": 1.0, "metrics": {"validation": 50.0}}
    for seed, names in ((0, ["standard"]), (1, ["standard", "random"])):
        run = {"study": "tiny", "metric": "accuracy", "seed": seed, "about": about}
        run["rows"] = [row | {"name": name} for name in names]
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(run))
    lines = table(tmp_path).splitlines()
    assert "| standard | 1.000 ± 0.000x | 50.00 ± 0.00 | dense |" in lines
    assert "| random (seed 1) | 1.000x | 50.00 | dense |" in lines


def test_the_table_shows_exact_match_beside_f1(tmp_path):
    about = {"examples": {"validation": 10, "test": 20}, "data": "some", "hardware": "cpu", "Training": "short"}
    row = {"name": "standard", "protocol": "real lengths, relative", "config": "dense", "cost": 1.0}
    for seed, f1, em in ((0, 60.0, 40.0), (1, 62.0, 44.0)):
        further = {"validation": {"exact_match": em, "log_prob": -1.0}, "test": {"exact_match": em + 1}}
        rows = [row | {"metrics": {"validation": f1, "test": f1 + 1}, "further": further}]
        run = {"study": "tiny", "metric": "f1", "seed": seed, "about": about, "rows": rows}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(run))
    lines = table(tmp_path).splitlines()
    assert lines[0] == "# tiny: f1 / exact_match in percent"
    assert "| standard | 1.000 ± 0.000x | 61.00 ± 1.41 / 42.00 ± 2.83 | 62.00 ± 1.41 / 43.00 ± 2.83 | dense |" in lines


def test_a_constant_ratio_within_a_budget_is_the_dearest_one():
    plan = SearchPlan(num_layers=6, max_length=128, p=0.36, cost=lambda config: sum(config.lengths) / (6 * 128))
    config = constant_ratio_within(plan, 0.5)
    assert plan.cost_of(config) <= 0.5
    assert plan.cost_of(config) > 0.48
    assert constant_ratio_within(plan, 0.01) == LengthConfig.constant_ratio(0.36, 6, 128)
    assert constant_ratio_within(plan, 1.0).is_full


def test_an_encoder_can_be_cut(tmp_path):
    from transformers import AutoModel

    spec = load_spec(make_study(tmp_path, layers=2))
    cut = AutoModel.from_pretrained(pretrained(spec))
    whole = AutoModel.from_pretrained(spec.model.checkpoint)
    assert cut.config.num_hidden_layers == 2
    for name, values in cut.state_dict().items():
        assert values.equal(whole.state_dict()[name]), name
    assert pretrained(spec) == str(spec.output / "pretrained")
    with pytest.raises(SpecError, match="has 3 layers; keep fewer than that, not 3"):
        pretrained(load_spec(make_study(tmp_path, layers=3), ["output=elsewhere"]))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attention_dropout_can_be_set(tmp_path, family):
    from transformers import AutoConfig, AutoModel, DistilBertConfig, DistilBertModel

    from lat_optuna.model import adapt
    from lat_optuna.model.families import family_of

    spec = load_spec(make_study(tmp_path, attention_dropout=0.0))
    if family == "distilbert":
        config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=16, n_layers=2, n_heads=2)
        DistilBertModel(config).save_pretrained(spec.model.checkpoint)
    model = AutoModel.from_pretrained(pretrained(spec))
    of = family_of(model.config)
    assert of.dropout(next(iter(of.layers(adapt(model))))) == 0
    assert AutoConfig.from_pretrained(spec.model.checkpoint).to_dict() != model.config.to_dict()
    with pytest.raises(SpecError, match="attention_dropout"):
        load_spec(make_study(tmp_path, attention_dropout=1.0))


def test_wrong_use_is_named(tmp_path):
    study = make_study(tmp_path)
    twice = CliRunner().invoke(main, ["reproduce", str(study), str(study)])
    assert twice.exit_code == 2
    assert "same name" in twice.output
    seeds = CliRunner().invoke(main, ["reproduce", str(study), "--seeds", "one"])
    assert seeds.exit_code == 2
    assert "'one' is no list of whole numbers" in seeds.output
    with pytest.raises(FileNotFoundError, match="holds no results"):
        table(tmp_path)
