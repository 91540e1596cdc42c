"""The package as people install it: a wheel with everything in it, imports that cost nothing, no import circles."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the wheel's contents and nothing of this repository."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_all_modules_templates_and_studies(installed):
    def inside(folder: Path, pattern: str) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}

    for pattern in ("*.py", "*.cpp", "templates/*", "py.typed"):
        assert inside(installed / "lat_optuna", pattern) >= inside(ROOT / "lat_optuna", pattern)
    # Not the manifests of a cluster in the folder below: they are copied and edited, not run from the package.
    studies = {path.name for path in (ROOT / "studies").glob("*.yaml")}
    assert inside(installed / "lat_optuna" / "studies", "*.yaml") == studies


def test_the_wheel_imports_and_answers(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = run(sys.executable, "-c", "import lat_optuna; print(lat_optuna.__file__)", env=environment, cwd=tmp_path)
    assert where.stdout.startswith(str(installed))
    shown = run(sys.executable, "-m", "lat_optuna", "--help", env=environment, cwd=tmp_path)
    assert shown.returncode == 0
    assert "quickstart" in shown.stdout
    # The study files came along: a wrong key of one is found, though no such file lies here.
    wrong = run(
        *(sys.executable, "-m", "lat_optuna", "train", "quickstart.yaml", "--set", "modle=1"),
        env=environment,
        cwd=tmp_path,
    )
    assert wrong.returncode == 2
    assert "did you mean model?" in wrong.stderr


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("lat_optuna", ["torch", "transformers", "optuna", "plotly", "datasets"]),
        ("lat_optuna.cli", ["torch", "transformers", "optuna", "plotly", "datasets", "pydantic"]),
        ("lat_optuna.length_config", ["torch", "optuna", "numpy"]),
        ("lat_optuna.search.sampler", ["torch", "transformers", "datasets"]),
        ("lat_optuna.search.study", ["torch", "transformers", "lat_optuna.trainer", "lat_optuna.report"]),
        ("lat_optuna.search.worker", ["transformers", "lat_optuna.trainer", "lat_optuna.report", "lat_optuna.cli"]),
    ],
)
def test_what_a_module_does_not_load(module, unloaded):
    code = f"import sys, {module}; print([name for name in {unloaded!r} if name in sys.modules])"
    loaded = run(sys.executable, "-c", code)
    assert loaded.stdout.strip() == "[]", loaded.stdout + loaded.stderr


def test_every_public_name_exists():
    import lat_optuna

    for name in lat_optuna.__all__:
        assert getattr(lat_optuna, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lat_optuna.no_such_name
