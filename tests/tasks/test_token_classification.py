"""Words, their first tokens and their tags; entities scored as conlleval scores them."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import tiny_checkpoint, tiny_tokenizer, write_parquet

from lat_optuna.tasks.token_classification import NO_LABEL, TokenClassification, entities, entity_scores, is_iob

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ROWS = [
    {"id": "0", "tokens": ["The", "actor", "xy", "zwq"], "ner_tags": ["O", "O", "B-PER", "I-PER"]},
    {"id": "1", "tokens": ["bad", "plot"], "ner_tags": ["O", "O"]},
    {"id": "2", "tokens": ["in", "ab", "cd"], "ner_tags": ["O", "B-LOC", "I-LOC"]},
]


def make(folder, rows=ROWS, **settings):
    for split in ("train", "validation"):
        write_parquet(folder / f"{split}.parquet", rows)
    return TokenClassification(tiny_tokenizer(), str(folder), **{"max_length": 16, **settings})


def logits_for(task, split, tags):
    """Predictions that say ``tags`` (names, row by row) at every word's first token, and nonsense elsewhere."""
    left = [tag for row in tags for tag in row]
    predictions = []
    for labels in task.features(split)["labels"]:
        logits = np.random.default_rng(0).normal(size=(len(labels), len(task.label_names))).astype("f4")
        for token, label in enumerate(labels):
            if label != NO_LABEL:
                logits[token] = 0
                logits[token, task.label_names.index(left.pop(0))] = 1
        predictions.append(logits)
    assert not left
    return predictions


def test_a_words_tag_lies_on_its_first_token(tmp_path):
    task = make(tmp_path)
    assert task.label_names == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    first = task.features("train")[0]
    tokens = task.tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert tokens == ["[CLS]", "the", "actor", "x", "##y", "z", "##w", "##q", "[SEP]"]
    o, person, rest = (task.label_names.index(name) for name in ("O", "B-PER", "I-PER"))
    x = NO_LABEL
    assert first["labels"] == [x, o, o, person, x, rest, x, x, x]


@settings(deadline=None)
@given(st.data())
def test_no_word_goes_unread_however_short_the_inputs(data):
    words = data.draw(st.lists(st.sampled_from(["film", "plot", "abc", "defgh", "ijklmnop"]), min_size=1, max_size=12))
    tags = data.draw(st.lists(st.integers(0, 4), min_size=len(words), max_size=len(words)))
    length = data.draw(st.integers(5, 12))
    task = object.__new__(TokenClassification)
    task.tokenizer, task.max_length, task._columns = tiny_tokenizer(), length, ("tokens", "ner_tags")
    features, sources = task._encode(datasets.Dataset.from_dict({"tokens": [words] * 2, "ner_tags": [tags] * 2}))
    assert max(map(len, features["input_ids"])) <= length
    for row in (0, 1):
        found = [label for labels, of in zip(features["labels"], sources, strict=True) if of == row for label in labels]
        assert [label for label in found if label != NO_LABEL] == tags


def test_the_metric_is_the_f1_of_entities_over_whole_rows(tmp_path):
    task = make(tmp_path, max_length=6, label_names=NAMES)
    assert len(task.features("validation")) > len(ROWS)  # rows are cut, inside of an entity too
    assert len(task.examples("validation")) == len(task.features("validation"))
    assert sorted(set(task.examples("validation"))) == [0, 1, 2]
    assert task.metric_name == "f1"
    right = [row["ner_tags"] for row in ROWS]
    scores = task.score("validation", logits_for(task, "validation", right))
    assert scores == {"f1": 100.0, "precision": 100.0, "recall": 100.0, "accuracy": 100.0}
    assert next(iter(scores)) == "f1"
    wrong = [["O", "O", "B-PER", "O"], ["B-LOC", "O"], ["O", "B-LOC", "I-LOC"]]
    scores = task.score("validation", logits_for(task, "validation", wrong))
    assert scores["precision"] == pytest.approx(100 / 3)
    assert scores["recall"] == pytest.approx(50)
    assert scores["f1"] == pytest.approx(40)
    assert scores["accuracy"] == pytest.approx(100 * 7 / 9)


def test_other_tags_are_scored_by_accuracy_and_words_without_a_tag_do_not_count(tmp_path):
    rows = [{"tokens": ["good", "film", "very"], "ner_tags": [0, NO_LABEL, 1]}]
    task = make(tmp_path, rows, label_names=("NOUN", "VERB"))
    assert task.metric_name == "accuracy"
    scores = task.score("validation", logits_for(task, "validation", [["NOUN", "NOUN"]]))
    assert scores == {"accuracy": 50.0}


def test_a_model_that_breaks_down_has_no_metric(tmp_path):
    task = make(tmp_path)
    predictions = logits_for(task, "validation", [row["ner_tags"] for row in ROWS])
    predictions[1][1] = np.nan
    assert np.isnan(task.score("validation", predictions)["f1"])


def test_names_come_from_the_data_set(tmp_path):
    names = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    rows = {
        "tokens": [row["tokens"] for row in ROWS],
        "ner_tags": [[NAMES.index(t) for t in r["ner_tags"]] for r in ROWS],
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=names).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert TokenClassification(tiny_tokenizer(), str(tmp_path), max_length=16).label_names == NAMES


def test_rows_can_be_held_out(tmp_path):
    rows = [{"tokens": ["good", f"k{i}"], "ner_tags": ["O", "B-PER"]} for i in range(20)]
    task = make(tmp_path, rows, search_rows=4, test_rows=3)
    sizes = {split: len(task.features(split)) for split in ("train", "search", "test", "validation")}
    assert sizes == {"train": 13, "search": 4, "test": 3, "validation": 20}
    seen = [tuple(ids) for split in ("train", "search", "test") for ids in task.features(split)["input_ids"]]
    assert len(set(seen)) == 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"tokens": ["a", "b", "c"], "ner_tags": ["O", "B-PER"]}], "row 0 has 3 words and 2 tags"),
        ([{"tokens": ["a"], "tags": ["O"]}], "no column 'ner_tags'; there is tokens, tags"),
        ([{"tokens": ["a"], "ner_tags": ["O"]}], "two or more tags"),
    ],
)
def test_data_that_do_not_fit_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, rows)


def test_a_tag_that_is_none_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "ner_tags": [0, 7]}))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "ner_tags": [0, 1]}))
    with pytest.raises(ValueError, match="split 'train': tag 7 in row 0 is not one of O, B-PER"):
        TokenClassification(tiny_tokenizer(), str(tmp_path), label_names=("O", "B-PER"), max_length=16)


def test_log_probs_and_predictions_of_a_real_model(tmp_path):
    task = make(tmp_path)
    model = task.build_model(tiny_checkpoint(tmp_path / "model")).eval()
    assert model.config.id2label[1] == "B-LOC"
    batch = task.collate([task.features("validation")[row] for row in range(3)])
    assert batch["labels"].shape == batch["input_ids"].shape
    with torch.no_grad():
        outputs = model(**batch)
    predictions = task.predictions(outputs, batch)
    for row, logits in enumerate(predictions):
        labels = np.asarray(task.features("validation")[row]["labels"])
        assert logits.shape == (len(labels), 5)
        log_probs = torch.from_numpy(logits).log_softmax(-1).numpy()
        expected = np.mean([log_probs[token, label] for token, label in enumerate(labels) if label != NO_LABEL])
        assert task.log_probs(outputs, batch)[row].item() == pytest.approx(expected, abs=1e-5)
    # What is said of tokens without a label is of no consequence; of one word in the third row, something else.
    others = [logits.copy() for logits in predictions]
    others[1][np.asarray(task.features("validation")[1]["labels"]) == NO_LABEL] = 7 * np.eye(5)[2]
    words = np.flatnonzero(np.asarray(task.features("validation")[2]["labels"]) != NO_LABEL)
    others[2][words[0]] = [50, 0, 0, 0, 0]
    agreement = task.agreement("validation", np.arange(3), others, predictions)
    same = torch.from_numpy(predictions[2][words[0]]).softmax(-1)[0].item()
    assert agreement == pytest.approx([100, 100, 100 * (len(words) - 1 + same) / len(words)], abs=1e-3)


def test_the_fingerprint_tells_tags_apart(tmp_path):
    one = make(tmp_path / "a").fingerprint("validation")
    assert make(tmp_path / "b").fingerprint("validation") == one
    other = [{**ROWS[0], "ner_tags": ["O", "O", "B-PER", "B-PER"]}, *ROWS[1:]]
    assert make(tmp_path / "c", other).fingerprint("validation") != one


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O B-A", [("A", 1, 3), ("A", 4, 5)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-A O I-B", [("A", 0, 2), ("B", 3, 4)]),  # entities that begin with I- count, as in conlleval
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags, expected):
    assert list(entities(tags.split())) == expected


def test_scores_of_nothing():
    assert entity_scores([["O"]], [["O"]])["f1"] == 0
    assert entity_scores([["B-A"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert is_iob(NAMES)
    assert not is_iob(("O",))
    assert not is_iob(("NOUN", "VERB"))
