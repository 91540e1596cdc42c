"""The README stays true: its Python runs, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from tests.tiny_text import sentences, tiny_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def scaled_down(code: str) -> str:
    for large, small in (
        ("num_layers=12", "num_layers=3"),
        ("range(1, 13)", "range(1, 4)"),
        ("num_train_epochs=5", "num_train_epochs=1, report_to='none', use_cpu=True"),
        ("n_trials=300", "n_trials=5"),
    ):
        code = code.replace(large, small)
    return code


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(Path("my-fine-tuned-bert")))
    options = {"truncation": True, "max_length": 16, "padding": False}
    rows = [{**tokenizer(row["sentence"], **options), "labels": row["label"]} for row in sentences(16)]
    training, search = PYTHON
    space = {"tokenized": datasets.Dataset.from_list(rows)}
    exec(scaled_down(training), space)
    assert Path("my-adaptive-bert/length_adaptive.json").exists()
    model = space["model"].eval()
    assert model.length_config.num_layers == 3

    def accuracy(model) -> float:
        with torch.inference_mode():
            return float(model(**tokenizer("good film", return_tensors="pt")).logits[0, 0])

    space = {"model": model, "accuracy": accuracy, "flops": lambda model: 1.0}
    exec(scaled_down(search), space)
    assert len(space["study"].trials) == 5


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_command_exists():
    from lat_optuna.cli import main

    named = set(re.findall(r"lat-optuna ([a-z]+)", README))
    assert named >= {"quickstart", "train", "search", "worker", "front", "report", "dashboard"}
    for command in named:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0, command
