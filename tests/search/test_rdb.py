"""The lean storage against Optuna's own, on the same database."""

from __future__ import annotations

import optuna
import pytest
from databases import postgres_server
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lat_optuna.search.rdb import ROWS_PER_STATEMENT, LeanStorage

optuna.logging.set_verbosity(optuna.logging.WARNING)
DISTRIBUTIONS = {
    "length_02": IntDistribution(1, 128),
    "length_01": IntDistribution(1, 128),
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "kind": CategoricalDistribution(["a", None, 3]),
}
PARAMS = {"length_02": 7, "length_01": 128, "rate": 0.01, "kind": None}


def template(state=TrialState.RUNNING, **content):
    return optuna.trial.create_trial(state=state, params=PARAMS, distributions=DISTRIBUTIONS, **content)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/study.db"
        return
    with postgres_server() as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


TRIALS = [
    template(user_attrs={"slot": 3, "parents": [1, 2]}, system_attrs={"beat": 4}),
    template(TrialState.COMPLETE, values=[float("inf"), -1.5], user_attrs={"details": {"seconds": 0.1}}),
    template(TrialState.COMPLETE, values=[float("-inf"), 2.0]),
    template(TrialState.PRUNED, intermediate_values={1: 0.5, 3: float("nan"), 4: float("inf")}),
    template(TrialState.FAIL, user_attrs={"fail": "died"}),
]


def test_both_read_alike_what_either_has_written(url):
    lean, optunas = LeanStorage(url), RDBStorage(url)
    study_id = lean.create_new_study([optuna.study.StudyDirection.MAXIMIZE] * 2)
    other = lean.create_new_study([optuna.study.StudyDirection.MAXIMIZE] * 2)
    for trial in TRIALS:
        for storage in (lean, optunas):
            storage.create_new_trial(other)
            storage.create_new_trial(study_id, trial)
    lean.create_new_trial(study_id)
    by_lean, by_optuna = lean.get_all_trials(study_id), optunas.get_all_trials(study_id)
    assert [trial.number for trial in by_lean] == list(range(11))
    # Repr, since NaN differs from itself.
    assert list(map(repr, by_lean)) == list(map(repr, by_optuna))
    for mine, theirs in zip(by_lean[:10:2], by_lean[1:10:2], strict=True):
        for content in ("state", "values", "params", "distributions", "user_attrs", "system_attrs", "datetime_start"):
            assert getattr(mine, content) == getattr(theirs, content), content
        assert list(mine.params) == list(theirs.params) == list(PARAMS)
    running = lean.get_all_trials(study_id, states=(TrialState.RUNNING,))
    assert [trial.number for trial in running] == [0, 1, 10]


def test_only_what_is_asked_for_is_read(tmp_path):
    lean = LeanStorage(f"sqlite:///{tmp_path}/study.db")
    study_id = lean.create_new_study([optuna.study.StudyDirection.MAXIMIZE])
    ids = [lean.create_new_trial(study_id, template()) for _ in range(2 * ROWS_PER_STATEMENT + 3)]
    read = lean._get_trials(study_id, None, {ids[1], ids[4], ids[-1]}, ids[-3])
    assert [trial._trial_id for trial in read] == [ids[1], ids[4], ids[-2], ids[-1]]
    assert [trial.number for trial in lean.get_all_trials(study_id)] == list(range(len(ids)))


def test_a_study_that_there_is_not_is_an_error_and_an_empty_one_is_not(tmp_path):
    lean = LeanStorage(f"sqlite:///{tmp_path}/study.db")
    study_id = lean.create_new_study([optuna.study.StudyDirection.MAXIMIZE])
    assert lean.get_all_trials(study_id) == []
    with pytest.raises(KeyError):
        lean.get_all_trials(study_id + 1)
