"""The file that makes an ordinary checkpoint a length-adaptive one."""

from __future__ import annotations

import json

import pytest

from lat_optuna.length_config import LengthConfig
from lat_optuna.model.checkpoint import SIDE_FILE, FrontPoint, SideFile, read_side_file, write_side_file


def example() -> SideFile:
    return SideFile(
        num_layers=3,
        max_length=128,
        retention="absolute",
        training={"p": 0.35, "epochs": [3, 5]},
        metric="accuracy",
        front=(
            FrontPoint((80, 40, 20), 88.5, 0.31, {"latency_ms": 2.5}),
            FrontPoint((128, 128, 128), 90.0, 1.0),
        ),
        length_config=LengthConfig((80, 40, 20), 128, "absolute"),
    )


def test_round_trip(tmp_path):
    write_side_file(tmp_path, example())
    assert read_side_file(tmp_path) == example()
    assert [path.name for path in tmp_path.iterdir()] == [SIDE_FILE]


def test_points_become_configurations():
    side = example()
    assert side.config_of(side.front[0]) == side.length_config


def test_a_checkpoint_without_the_file_is_dense(tmp_path):
    assert read_side_file(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"length_config": [128, 64]}, "has 2 layers, not 3"),
        ({"length_config": [64, 128, 1]}, "layer 2 keeps 128"),
        ({"front": [{"lengths": [1, 2, 3], "metric": 1, "cost": 1, "extra": {}}]}, "layer 2 keeps 2"),
        ({"max_length": None}, "is not a valid"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    path = write_side_file(tmp_path, example())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        read_side_file(tmp_path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_json_is_named(tmp_path):
    (tmp_path / SIDE_FILE).write_text("{")
    with pytest.raises(ValueError, match=SIDE_FILE):
        read_side_file(tmp_path)
