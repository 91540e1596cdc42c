"""Racing: what belongs on the front stays, what clearly does not is abandoned early, and searches stay exact."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import torch
from tiny_text import questions, sentences, tiny_checkpoint, write_parquet

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt
from lat_optuna.search.evaluator import Abandoned, Evaluation, ModelEvaluator, StandInEvaluator
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.racing import Racing, Rival, pack, unpack
from lat_optuna.search.study import Ledger, load_study
from lat_optuna.search.worker import Search, launch, run_worker
from lat_optuna.tasks.question_answering import QuestionAnswering
from lat_optuna.tasks.text_classification import TextClassification

optuna.logging.set_verbosity(optuna.logging.WARNING)


def lost_at(racing: Racing, scores: np.ndarray, rival: Rival) -> int | None:
    """How many examples were seen when a race was lost."""
    order = racing.order(len(scores))
    for stop in racing.stops(len(scores)):
        seen = np.full(len(scores), np.nan)
        seen[order[:stop]] = scores[order[:stop]]
        if racing.is_lost(seen, rival):
            return stop
    return None


def lost(racing: Racing, differences: np.ndarray) -> bool:
    return lost_at(racing, differences, Rival(0, "metric", np.zeros(len(differences)))) is not None


def accuracy(rng, examples, better, worse):
    """Differences of two models' right and wrong answers."""
    changed = rng.permutation(examples)[: better + worse]
    differences = np.zeros(examples)
    differences[changed[:better]], differences[changed[better:]] = 100.0, -100.0
    return differences


@pytest.mark.parametrize("kind", ["accuracy", "probability", "fewer, larger gains"])
def test_what_is_barely_better_is_lost_in_one_of_a_hundred_orders_at_most(kind):
    rng = np.random.default_rng(0)
    examples = 2000
    if kind == "accuracy":
        differences = accuracy(rng, examples, better=26, worse=25)
    elif kind == "probability":
        differences = rng.standard_t(3, examples)
        differences += 1e-6 - differences.mean()
    else:
        differences = np.full(examples, -0.5)
        differences[: examples // 10] = 4.51
    assert differences.mean() > 0
    orders = 2000
    count = sum(lost(Racing(seed=seed), differences) for seed in range(orders))
    assert count <= 0.01 * orders + 3 * np.sqrt(0.01 * orders)  # three standard errors of the count


def test_what_is_clearly_worse_is_abandoned_at_a_first_look_and_what_is_equal_is_not():
    rng = np.random.default_rng(0)
    racing = Racing()
    worse = accuracy(rng, 2000, better=10, worse=200)
    assert lost_at(racing, worse, Rival(0, "metric", np.zeros(2000))) == racing.stops(2000)[0]
    assert not lost(racing, np.zeros(2000))
    assert not racing.is_lost(worse, Rival(0, "metric", np.zeros(2000)))  # all were seen: nothing is left to abandon


def relatives(rng, examples, gain):
    """Probabilities of a configuration, whose mean is ``gain`` above its rival's, and of others like it."""
    common = rng.uniform(5, 95, examples)
    styles = rng.normal(0, 3, (4, examples))
    rival, *neighbours = (common + weights @ styles for weights in rng.normal(0, 1, (5, 4)))
    scores = common + rng.normal(0, 1, 4) @ styles + rng.normal(0, 0.3, examples)
    return scores + rival.mean() - scores.mean() + gain, Rival(0, "probability", rival, neighbours)


def test_neighbours_show_sooner_what_is_worse_and_lose_no_more_of_what_is_not():
    rng = np.random.default_rng(0)
    orders = 1000
    scores, rival = relatives(rng, 2000, gain=1e-6)
    count = sum(lost_at(Racing(seed=seed), scores, rival) is not None for seed in range(orders))
    assert count <= 0.01 * orders + 3 * np.sqrt(0.01 * orders)
    scores, rival = relatives(rng, 2000, gain=-0.3)
    alone = Rival(0, "probability", rival.scores)
    together = [lost_at(Racing(seed=seed), scores, rival) or 2000 for seed in range(20)]
    assert np.mean(together) < 0.7 * np.mean([lost_at(Racing(seed=seed), scores, alone) or 2000 for seed in range(20)])


def test_looks_rise_to_all_examples_and_are_not_at_a_handful():
    assert Racing().stops(2000) == [250, 500, 750, 1000, 1250, 1500, 1750, 2000]
    assert Racing().stops(300) == [113, 150, 188, 225, 263, 300]
    assert Racing().stops(90) == [90]
    assert sorted(Racing().order(100)) == list(range(100))
    assert list(Racing().order(100)) == list(Racing().order(100)) != list(Racing(seed=1).order(100))


def test_scores_survive_packing():
    scores = np.array([0.0, 100.0, 33.3333, np.nan, 99.999])
    assert unpack(pack(scores)) == pytest.approx(scores, abs=0.001, nan_ok=True)
    assert len(pack(np.tile([0.0, 100.0], 2000))) < 200


# ---------------------------------------------------------------------- the evaluator


@pytest.fixture(scope="module", params=["classification", "question answering"])
def raced(request, tmp_path_factory):
    """A task of 120 examples and an adapted model."""
    folder = tmp_path_factory.mktemp("raced")
    checkpoint = tiny_checkpoint(folder / "model")
    if request.param == "classification":
        write_parquet(folder / "validation.parquet", sentences(120, seed=2, longest=15))
        task = TextClassification(checkpoint, folder, max_length=20, train_split=None)
    else:
        write_parquet(folder / "validation.parquet", questions(120, words=60))
        task = QuestionAnswering(checkpoint, folder, max_length=40, stride=10, train_split=None)
    return task, adapt(task.build_model(checkpoint))


def test_a_race_that_is_run_to_its_end_gives_what_an_evaluation_gives(raced):
    task, model = raced
    config = LengthConfig((12, 9, 6), task.max_length)
    plain = ModelEvaluator(model, task).evaluate(config)
    evaluator = ModelEvaluator(model, task, racing=Racing())
    whole = evaluator.evaluate(config)
    assert whole.metric == pytest.approx(plain.metric)
    assert whole.details == pytest.approx(plain.details, abs=1e-4)
    assert np.mean(whole.by_example["metric"]) == pytest.approx(whole.metric)
    assert np.nanmean(whole.by_example["probability"]) == pytest.approx(whole.details["probability"], abs=1e-4)
    weak = Rival(0, "metric", np.zeros(evaluator.num_examples))
    outcome = ModelEvaluator(model, task, racing=Racing()).race(config, weak)
    assert isinstance(outcome, Evaluation)
    assert (outcome.metric, outcome.details, outcome.cost) == (whole.metric, whole.details, whole.cost)


def test_agreement_with_the_full_model_is_told_example_by_example(raced):
    task, model = raced
    config = LengthConfig((12, 9, 6), task.max_length)
    evaluator = ModelEvaluator(model, task, racing=Racing(), agreement=True)
    found = evaluator.evaluate(config)
    owners = [*range(120)] if isinstance(task, TextClassification) else task.examples("validation")
    expected = [[] for _ in range(120)]
    for owner, feature in zip(owners, task.features("validation"), strict=True):
        names = ("input_ids", "token_type_ids")
        inputs = {name: torch.tensor([feature[name]]) for name in names if name in feature}
        distributions = []
        for at in (None, config):
            with torch.no_grad(), model.at(at):
                outputs = model(**inputs)
            logits = [outputs.logits] if "logits" in outputs else [outputs.start_logits, outputs.end_logits]
            distributions.append(torch.cat(logits).softmax(-1))
        expected[owner].append(100 * torch.minimum(*distributions).sum(-1).mean().item())
    assert found.by_example["agreement"] == pytest.approx([np.mean(values) for values in expected], abs=1e-3)
    assert found.score("agreement") == pytest.approx(np.mean(found.by_example["agreement"]), abs=1e-4)
    full = LengthConfig.full(config.num_layers, task.max_length)
    assert evaluator.evaluate(full).score("agreement") == pytest.approx(100, abs=1e-4)
    outcome = evaluator.race(LengthConfig((11, 9, 6), task.max_length), Rival(0, "agreement", np.full(120, 100.0)))
    assert isinstance(outcome, Abandoned)
    with pytest.raises(ValueError, match="selects by 'agreement', but the task measures"):
        ModelEvaluator(model, task).evaluate(config).score("agreement")


def test_a_task_that_cannot_tell_agreement_is_named(raced, monkeypatch):
    task, model = raced
    monkeypatch.delattr(next(kind for kind in type(task).__mro__ if "agreement" in vars(kind)), "agreement")
    with pytest.raises(ValueError, match="cannot tell how far predictions agree; set search"):
        ModelEvaluator(model, task, agreement=True)


def test_a_lost_race_is_abandoned_with_what_was_seen(raced):
    task, model = raced
    config = LengthConfig((12, 9, 6), task.max_length)
    evaluator = ModelEvaluator(model, task, racing=Racing())
    seen = []
    hook = model.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["input_ids"])), with_kwargs=True)
    strong = Rival(0, "probability", np.full(evaluator.num_examples, 100.0))
    outcome = evaluator.race(config, strong)
    hook.remove()
    assert isinstance(outcome, Abandoned)
    first = Racing().stops(evaluator.num_examples)[0]
    assert outcome.examples == first < evaluator.num_examples
    assert sum(seen) < len(task.features("validation"))
    scores = evaluator.evaluate(config).by_example
    looked_at = Racing().order(evaluator.num_examples)[:first]
    assert outcome.metric == pytest.approx(scores["metric"][looked_at].mean(), rel=1e-5)
    assert outcome.details["probability"] == pytest.approx(np.nanmean(scores["probability"][looked_at]), rel=1e-5)
    with pytest.raises(ValueError, match="a rival of as many, not of 7"):
        evaluator.race(config, Rival(0, "metric", np.zeros(7)))


# ---------------------------------------------------------------------- the search


def make_evaluator(device, racing=True):
    return StandInEvaluator(4, 64, racing=Racing() if racing else None)


def make_plan(evaluator):
    return SearchPlan(4, 64, p=0.3, num_initial=4, num_mutations=3, num_crossovers=3, cost=evaluator.cost)


def search_in(folder, **changes) -> Search:
    storage = f"sqlite:///{folder / 'study.db'}"
    settings = {"n_trials": 40, "racing": True, "reproducible": True}
    return Search(storage, "race", make_evaluator, make_plan, **(settings | changes))


def trials_of(search: Search) -> list:
    trials = load_study(search.storage, search.name).get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return sorted(finished, key=lambda trial: trial.user_attrs["slot"])


def outcome_of(trial) -> tuple:
    pruned = {key: value for key, value in trial.user_attrs.get("pruned", {}).items() if key != "seconds"}
    return trial.user_attrs["config"], trial.state.name, trial.values, pruned


def test_a_search_abandons_what_cannot_join_its_front_and_counts_it(tmp_path):
    search = search_in(tmp_path)
    ended = run_worker(search)
    assert (ended.standing, ended.done) == ("done", 40)
    trials = trials_of(search)
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(trial.user_attrs["slot"] >= 4 for trial in pruned)  # the initial population is measured in full
    stand_in = StandInEvaluator(4, 64)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    for trial in pruned:
        assert trial.values is None
        assert not trial.intermediate_values
        assert trial.user_attrs["pruned"]["examples"] < 512
        full = stand_in.evaluate(LengthConfig.parse(trial.user_attrs["config"], 64))
        assert any(other.values[0] >= full.metric and other.values[1] <= full.cost for other in complete)


def test_a_race_with_several_workers_is_the_same_as_with_one(tmp_path):
    alone, together = tmp_path / "one", tmp_path / "three"
    alone.mkdir()
    together.mkdir()
    run_worker(search_in(alone))
    launch(search_in(together), ["cpu"] * 3, folder=together)
    assert list(map(outcome_of, trials_of(search_in(alone)))) == list(map(outcome_of, trials_of(search_in(together))))


def test_a_race_that_is_broken_off_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_worker(search_in(whole, reproducible=False))
    for n_trials in (9, 23, 40):
        run_worker(search_in(broken, reproducible=False, n_trials=n_trials))
    assert list(map(outcome_of, trials_of(search_in(whole)))) == list(map(outcome_of, trials_of(search_in(broken))))


def test_an_evaluator_that_cannot_race_measures_in_full(tmp_path):
    from functools import partial

    search = search_in(tmp_path)
    run_worker(Search(**{**search.__dict__, "make_evaluator": partial(make_evaluator, racing=False)}))
    assert {trial.state.name for trial in trials_of(search)} == {"COMPLETE"}


def test_a_front_does_not_race_itself(tmp_path):
    """A configuration cheaper than the whole front has no rival."""
    search = search_in(tmp_path, n_trials=4)
    run_worker(search)
    study = load_study(search.storage, search.name)
    ledger = Ledger(study, make_plan(make_evaluator("cpu")), 10)
    claim = ledger.claim()
    assert claim is not None
    cheapest = LengthConfig((1, 1, 1, 1), 64)
    assert ledger.rival(type(claim)(claim.trial_id, claim.number, claim.slot, cheapest)) is None
    rival = ledger.rival(claim)
    assert rival is not None
    better = [one for one in ledger.front() if one.cost <= make_evaluator("cpu").cost(claim.config)]
    assert rival.number == max(better, key=lambda one: one.metric).number
    assert rival.scores.mean() == pytest.approx(study.trials[rival.number].values[0], abs=0.001)
