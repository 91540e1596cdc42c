"""``lat-optuna evaluate``: the search's own figures come out again, with errors; wrong use is told."""

from __future__ import annotations

import json

import pytest

from tests.in_process import run
from tests.test_cli import finished  # noqa: F401
from tests.tiny_text import sentences, write_parquet


def evaluated(study, *arguments) -> dict:
    done = run("evaluate", study, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_whole_front_has_the_metrics_that_the_search_measured(finished):  # noqa: F811
    _, study, _ = finished
    points = json.loads(run("front", study, "--json").stdout)["points"]
    found = evaluated(study, "--front")
    assert (found["metric"], found["data"], found["examples"]) == ("accuracy", "validation", 40)
    for point, one in zip(points, found["measurements"], strict=True):
        assert one["configuration"] == point["configuration"]
        assert one["metric"] == pytest.approx(point["accuracy"])
        assert one["flops_ratio"] == pytest.approx(point["flops_ratio"])
        share = one["metric"] / 100
        assert one["standard_error"] == pytest.approx(100 * (share * (1 - share) / 40) ** 0.5)
        assert one["latency_ms"] > 0
        assert one["dense_latency_ms"] > 0


def test_a_file_of_the_users_own(finished, tmp_path):  # noqa: F811
    _, study, _ = finished
    own = write_parquet(tmp_path / "own.parquet", sentences(7, seed=5))
    found = evaluated(study, "--dense", "--data", own)
    assert (found["data"], found["examples"]) == (str(own), 7)
    assert found["measurements"][0]["configuration"] == "dense"
    assert found["measurements"][0]["flops_ratio"] == 1
    done = run("evaluate", study, "--config", "16-12-3", "--data", own)
    assert done.returncode == 0, done.stderr
    assert "16-12-3" in done.stdout
    assert " ± " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name one thing to measure"),
        (["--dense", "--front"], 2, "name one thing to measure"),
        (["--dense", "--split", "test"], 1, "test"),
        (["--dense", "--split", "search", "--data", "x.csv"], 2, "give one of them"),
        (["--dense", "--data", "/nowhere/x.csv"], 1, "/nowhere/x.csv"),
        (["--config", "1-2-3"], 2, "--config 1-2-3"),
        (["--config", "16-12"], 1, "3 layers"),
        (["--budget", "0.001"], 1, "smallest costs"),
    ],
)
def test_wrong_use_of_evaluate(finished, arguments, code, message):  # noqa: F811
    _, study, _ = finished
    done = run("evaluate", study, *arguments)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
