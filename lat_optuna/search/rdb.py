"""Optuna's ``RDBStorage`` on the same tables, with a handful of statements where Optuna has one a parameter.

Many workers on one study spend their time creating whole trials and reading one another's. Optuna does either through
SQLAlchemy's objects, one a row. Here rows stay rows. It overrides two methods that Optuna does not document; where a
later Optuna no longer calls them, Optuna's own way is as right, and slower.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import bindparam, insert, select

ROWS_PER_STATEMENT = 500

Trial: Any = models.TrialModel
Value: Any = models.TrialValueModel
Intermediate: Any = models.TrialIntermediateValueModel
Param: Any = models.TrialParamModel
UserAttribute: Any = models.TrialUserAttributeModel
SystemAttribute: Any = models.TrialSystemAttributeModel

# Statements are built once: building them takes longer than running them.
HEADS = select(Trial.trial_id, Trial.number, Trial.state, Trial._datetime_start_utc, Trial._datetime_complete_utc)
HEADS = HEADS.where(Trial.study_id == bindparam("study"))
HEADS_BEYOND = HEADS.where(Trial.trial_id > bindparam("beyond"))
HEADS_OF = HEADS.where(Trial.trial_id.in_(bindparam("ids", expanding=True)))
LAST_NUMBER = select(Trial.number).where(Trial.study_id == bindparam("study")).order_by(Trial.trial_id.desc()).limit(1)


def _rows_by_trial(model: Any, *columns: Any, order: Any = None) -> Any:
    query = select(model.trial_id, *columns).where(model.trial_id.in_(bindparam("ids", expanding=True)))
    return query if order is None else query.order_by(order)


PARAMS = _rows_by_trial(Param, Param.param_name, Param.param_value, Param.distribution_json, order=Param.param_id)
VALUES = _rows_by_trial(Value, Value.value, Value.value_type, order=Value.objective)
USER_ATTRS = _rows_by_trial(UserAttribute, UserAttribute.key, UserAttribute.value_json)
SYSTEM_ATTRS = _rows_by_trial(SystemAttribute, SystemAttribute.key, SystemAttribute.value_json)
INTERMEDIATES = _rows_by_trial(
    Intermediate, Intermediate.step, Intermediate.intermediate_value, Intermediate.intermediate_value_type
)

to_distribution = lru_cache(maxsize=1024)(json_to_distribution)
to_json = lru_cache(maxsize=1024)(distribution_to_json)


class LeanStorage(RDBStorage):
    """See the module."""

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        """Insert a trial, in the transaction that has locked its study."""
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, None, session)
        last = session.scalar(LAST_NUMBER, {"study": study_id})
        trial = Trial(
            study_id=study_id,
            number=0 if last is None else last + 1,
            state=template_trial.state,
            datetime_start=template_trial.datetime_start,
            datetime_complete=template_trial.datetime_complete,
        )
        session.add(trial)
        session.flush()
        for model, rows in _rows_of(template_trial):
            if rows:
                session.execute(insert(model.__table__), [{"trial_id": trial.trial_id} | row for row in rows])
        return trial

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """The trials beyond an id and those of some ids before it, in the order of their ids."""
        study = {"study": study_id}
        before = sorted(trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than)
        with self.engine.connect() as connection:
            heads = list(connection.execute(HEADS_BEYOND, study | {"beyond": trial_id_greater_than}))
            for ids in _chunks(before):
                heads += connection.execute(HEADS_OF, study | {"ids": ids})
            if states is not None:
                heads = [row for row in heads if row[2] in states]
            if not heads and connection.scalar(select(models.StudyModel.study_id).filter_by(study_id=study_id)) is None:
                raise KeyError(models.NOT_FOUND_MSG)
            heads.sort(key=lambda row: row[0])
            return [trial for some in _chunks(heads) for trial in _assemble(connection, some)]


def _rows_of(trial: FrozenTrial) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """What a trial holds besides its own row, by table."""
    params = ((name, value, trial.distributions[name]) for name, value in trial.params.items())
    yield (
        Param,
        [
            {"param_name": name, "param_value": how.to_internal_repr(value), "distribution_json": to_json(how)}
            for name, value, how in params
        ],
    )
    stored = enumerate(map(Value.value_to_stored_repr, trial.values or ()))
    yield Value, [{"objective": index, "value": value, "value_type": kind} for index, (value, kind) in stored]
    for model, attrs in ((UserAttribute, trial.user_attrs), (SystemAttribute, trial.system_attrs)):
        yield model, [{"key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    yield (
        Intermediate,
        [
            {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
            for step, (value, kind) in (
                (step, Intermediate.intermediate_value_to_stored_repr(value))
                for step, value in trial.intermediate_values.items()
            )
        ],
    )


def _assemble(connection: sqlalchemy.Connection, heads: list[Any]) -> list[FrozenTrial]:
    """Trials from their rows of all tables."""
    ids = [row[0] for row in heads]
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    values: dict[int, list[float]] = defaultdict(list)
    user, system = defaultdict[int, dict[str, Any]](dict), defaultdict[int, dict[str, Any]](dict)
    intermediate: dict[int, dict[int, float]] = defaultdict(dict)

    def rows(query: Any) -> Iterable[Any]:
        return connection.execute(query, {"ids": ids})

    for trial_id, name, value, how in rows(PARAMS):
        distributions[trial_id][name] = distribution = to_distribution(how)
        params[trial_id][name] = distribution.to_external_repr(value)
    for trial_id, value, kind in rows(VALUES):
        values[trial_id].append(Value.stored_repr_to_value(value, kind))
    for query, attrs in ((USER_ATTRS, user), (SYSTEM_ATTRS, system)):
        for trial_id, key, text in rows(query):
            attrs[trial_id][key] = json.loads(text)
    for trial_id, step, value, kind in rows(INTERMEDIATES):
        intermediate[trial_id][step] = Intermediate.stored_repr_to_intermediate_value(value, kind)

    trials = []
    for trial_id, number, state, start, complete in heads:
        # Its properties turn what is stored, UTC, into local time.
        times = Trial(_datetime_start_utc=start, _datetime_complete_utc=complete)
        trials.append(
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=values.get(trial_id),
                datetime_start=times.datetime_start,
                datetime_complete=times.datetime_complete,
                params=params.get(trial_id, {}),
                distributions=distributions.get(trial_id, {}),
                user_attrs=user.get(trial_id, {}),
                system_attrs=system.get(trial_id, {}),
                intermediate_values=intermediate.get(trial_id, {}),
                trial_id=trial_id,
            )
        )
    return trials


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, ROWS_PER_STATEMENT)):
        yield some
