"""Question answering: the official metric, spans that are where the answers are, contexts of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import questions, tiny_checkpoint, tiny_tokenizer, write_parquet
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from lat_optuna.tasks.question_answering import QuestionAnswering, best_spans, exact_match, f1, normalise


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tmp_path):
    for split, seed in (("train", 1), ("validation", 2)):
        write_parquet(tmp_path / f"{split}.parquet", questions(15, seed))
    return tmp_path


@pytest.fixture
def task(tokenizer, folder):
    return QuestionAnswering(tokenizer, folder, max_length=40, stride=10)


def gold(task, split="validation"):
    """Logits that point at the features' own positions; nowhere in particular where there is no answer."""
    predictions = []
    for feature in task.features(split):
        logits = np.zeros((2, len(feature["input_ids"])), np.float32)
        if feature["end_positions"] > 0:
            logits[0, feature["start_positions"]] = logits[1, feature["end_positions"]] = 9
        predictions.append(logits)
    return predictions


def test_normal_form_of_answers():
    assert normalise("The  Cat,\tand a DOG's an-swer") == "cat and dogs answer"
    assert normalise("theatre") == "theatre"
    assert normalise("£20 – 30%") == "£20 – 30"


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "score"),
    [
        ("the Denver Broncos!", "Denver Broncos", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("a b b c", "b b d", 0, 2 * (2 / 3 * 2 / 3) / (2 / 3 + 2 / 3)),
        ("Carolina", "Denver Broncos", 0, 0),
        ("", "Denver", 0, 0),
        ("the", "a", 1, 0),  # as in the official script of version 1.1
    ],
)
def test_the_official_metric(prediction, answer, em, score):
    assert exact_match(prediction, answer) == em
    assert f1(prediction, answer) == pytest.approx(score)


@given(st.data())
def test_the_best_span_is_the_best_of_all(data):
    n = data.draw(st.integers(1, 12))
    logits = st.lists(st.floats(-5, 5, width=32), min_size=n, max_size=n)
    rows = data.draw(st.lists(st.tuples(logits, logits, st.integers(0, n)), min_size=1, max_size=3))
    starts, ends = (np.array([row[which] for row in rows], np.float32) for which in (0, 1))
    for values in (starts, ends):
        for row, (_, _, context) in zip(values, rows, strict=True):
            row[context:] = -np.inf
    longest = data.draw(st.integers(1, 14))
    for row, start, end, score in zip(range(len(rows)), *best_spans(starts, ends, longest), strict=True):
        context = rows[row][2]
        if not context:
            assert (start, end, score) == (0, 0, -np.inf)
            continue
        spans = [(i, j) for i in range(context) for j in range(i, min(context, i + longest))]
        sums = {(i, j): starts[row, i] + ends[row, j] for i, j in spans}
        assert (start, end) == min(spans, key=lambda span: (-sums[span], span[1] - span[0], span[0]))
        assert score == sums[start, end]


def test_right_positions_score_full_marks(task):
    assert task.score("validation", gold(task)) == {"f1": 100.0, "exact_match": 100.0}
    assert task.answers("validation", gold(task)) == [f"k{index}" for index in range(15)]


def test_long_contexts_become_overlapping_features(tokenizer, task):
    features = task.features("train")
    assert len(features) > 15
    words = [tokenizer.convert_ids_to_tokens(tokens) for tokens in features["input_ids"][:3]]
    assert {len(row) for row in words[:2]} == {40}
    asked = words[0].index("[SEP]") + 1
    assert words[0][:asked] == words[1][:asked]
    assert words[0][-11:-1] == words[1][asked : asked + 10]


def test_the_best_of_all_features_answers(task):
    predictions = gold(task)
    second = next(i for i in range(1, len(predictions)) if task._split("validation").examples[i] == 0)
    predictions[second][:, -3] += 20
    word = task.tokenizer.convert_ids_to_tokens(task.features("validation")[second]["input_ids"][-3])
    assert task.answers("validation", predictions)[0] == word


def test_only_spans_of_the_context_are_answers(task):
    """However much the model likes [CLS], the question or [SEP]."""
    tempted = gold(task)
    for logits, feature in zip(tempted, task.features("validation"), strict=True):
        context = feature["input_ids"].index(task.tokenizer.sep_token_id) + 1
        logits[:, :context] += 50
        logits[:, -1] += 50
    assert task.score("validation", tempted)["exact_match"] == 100.0


def test_several_right_answers_count_by_the_best(tokenizer, tmp_path):
    rows = questions(2)
    rows[0]["answers"] = {"text": [rows[0]["context"].split()[0], "k0"], "answer_start": [0, 0]}
    write_parquet(tmp_path / "validation.parquet", rows)
    task = QuestionAnswering(tokenizer, tmp_path, max_length=64, stride=0, train_split=None)
    predictions = gold(task)
    at = [task.tokenizer.decode(tokens).split() for tokens in task.features("validation")["input_ids"][:]]
    assert len(at) >= 2
    assert task.score("validation", predictions)["exact_match"] == 100.0


def test_questions_that_leave_no_room_are_cut(tokenizer, tmp_path):
    rows = questions(3)
    rows[1]["question"] = "why " * 100
    write_parquet(tmp_path / "validation.parquet", rows)
    task = QuestionAnswering(tokenizer, tmp_path, max_length=32, stride=8, train_split=None)
    assert max(map(len, task.features("validation")["input_ids"])) == 32
    assert task.score("validation", gold(task))["exact_match"] == 100.0


def test_predictions_are_without_padding_and_log_probabilities_ignore_it(task):
    features = [task.features("validation")[i] for i in range(len(task.features("validation")))]
    short = min(features, key=lambda feature: len(feature["input_ids"]))
    answered = next(feature for feature in features if feature["end_positions"] > 0)
    without = next(feature for feature in features if feature["end_positions"] == 0)
    batch = task.collate([short, answered, without])
    width = batch["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    starts, ends = torch.randn(2, 3, width, generator=generator)
    outputs = QuestionAnsweringModelOutput(start_logits=starts, end_logits=ends)
    predictions = task.predictions(outputs, batch)
    assert [prediction.shape for prediction in predictions] == [
        (2, len(feature["input_ids"])) for feature in (short, answered, without)
    ]
    log_probs = task.log_probs(outputs, batch)
    assert torch.isnan(log_probs[2])
    n = len(answered["input_ids"])
    expected = (
        starts[1, :n].log_softmax(-1)[answered["start_positions"]]
        + ends[1, :n].log_softmax(-1)[answered["end_positions"]]
    ) / 2
    assert log_probs[1].item() == pytest.approx(expected.item())


def test_a_model_s_nan_is_no_score(task):
    predictions = gold(task)
    predictions[3][0, 1] = np.nan
    assert all(np.isnan(value) for value in task.score("validation", predictions).values())


def test_the_fingerprint_covers_content_and_settings(tokenizer, folder, task):
    rows = questions(15, 2)
    rows[4]["answers"]["text"][1] = "another"
    write_parquet(folder / "other.parquet", rows)
    prints = {
        task.fingerprint("validation"),
        QuestionAnswering(tokenizer, folder, max_length=40, stride=11).fingerprint("validation"),
        QuestionAnswering(tokenizer, folder, max_length=41, stride=10).fingerprint("validation"),
        QuestionAnswering(tokenizer, folder, max_length=40, stride=10, validation_split="other").fingerprint(
            "validation"
        ),
    }
    assert len(prints) == 4
    again = QuestionAnswering(tokenizer, folder, max_length=40, stride=10, train_rows=3)
    assert again.fingerprint("validation") in prints


def test_the_model_has_two_outputs_a_token(tmp_path, folder):
    checkpoint = tiny_checkpoint(tmp_path / "model")
    task = QuestionAnswering(checkpoint, folder, max_length=40, stride=10)
    model = task.build_model(checkpoint)
    batch = task.collate([task.features("train")[i] for i in range(3)])
    assert model(**batch).start_logits.shape == batch["input_ids"].shape
    assert model(**batch).loss.isfinite()


def change(**values):
    return lambda rows: rows[2].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(answers={"text": [], "answer_start": []}), "question 'q2' has no answer"),
        (change(answers={"text": ["k2"], "answer_start": [10_000]}), "does not hold 'k2' at character 10000"),
        (change(context=None), "column 'context' is empty in row 2"),
        (lambda rows: [row.pop("question") for row in rows], "no column 'question'; there is id, context, answers"),
    ],
)
def test_rows_that_are_not_squad_s_are_named(tokenizer, tmp_path, damage, message):
    rows = questions(4)
    damage(rows)
    write_parquet(tmp_path / "validation.parquet", rows)
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(tokenizer, tmp_path, max_length=40, stride=10, train_split=None).features("validation")


def test_a_stride_that_leaves_no_room_is_named(tokenizer, folder):
    with pytest.raises(ValueError, match=r"stride must lie between 0 and half of max_length \(20\), not 21"):
        QuestionAnswering(tokenizer, folder, max_length=40, stride=21)
