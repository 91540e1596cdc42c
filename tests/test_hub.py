"""The OptunaHub package stands alone: optuna, numpy and its own files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUB = Path(__file__).parent.parent / "hub"


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_package_searches_without_lat_optuna(tmp_path, preset):
    subprocess.run([sys.executable, str(HUB / "build.py"), str(tmp_path)], check=True, capture_output=True)
    package = tmp_path / "length_config_search"
    assert {path.name for path in package.iterdir()} == {
        "__init__.py",
        "LICENSE",
        "README.md",
        "example.py",
        "length_config.py",
        "plan.py",
        "sampler.py",
        "surrogate.py",
    }
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lat_optuna", "torch", "transformers", "scipy"):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Refuse())
import optuna
from length_config_search import LengthConfigSampler
def objective(trial):
    lengths = [trial.suggest_int(f"length_{{layer:02d}}", 1, 64) for layer in range(1, 5)]
    assert lengths == sorted(lengths, reverse=True)
    return sum(length ** 0.5 for length in lengths), sum(lengths)
sampler = LengthConfigSampler(4, 64, p=0.3, preset={preset!r}, num_initial=4)
study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
study.optimize(objective, n_trials=12)
print(len({{tuple(trial.params.values()) for trial in study.trials}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12"
