"""Rows that are held out from the training rows: none of their text is trained on."""

import datasets
import pytest

from lat_optuna.tasks.data import hold_out
from lat_optuna.tasks.text_classification import TextClassification
from tests.tiny_text import tiny_tokenizer

SENTENCES = [
    "a film of quiet power and grace",
    "the plot is a mess from start to end",
    "one of the best of the year",
    "too long by half an hour",
    "a director with nothing left to say",
    "it made me laugh more than once",
]
PHRASES = ["quiet power", "a mess", "the best", "by half", "nothing", "laugh more", "a film", "the plot is a mess"]


def rows_of(texts):
    return datasets.Dataset.from_dict({"sentence": texts, "label": list(range(len(texts)))})


def test_only_whole_texts_are_held_out_and_their_parts_are_not_trained_on():
    parted = hold_out(rows_of(PHRASES + SENTENCES), {"search": 2, "test": 1}, "sentence", seed=0)
    assert {split: len(part) for split, part in parted.items() if split != "train"} == {"search": 2, "test": 1}
    held = parted["search"]["sentence"][:] + parted["test"]["sentence"][:]
    assert set(held) <= set(SENTENCES)
    trained = parted["train"]["sentence"][:]
    assert not any(f" {text} " in f" {whole} " for text in trained for whole in held)
    # Nothing else is lost.
    lost = set(PHRASES + SENTENCES) - set(trained) - set(held)
    assert all(any(f" {text} " in f" {whole} " for whole in held) for text in lost)


def test_rows_that_share_a_text_go_together():
    premises = [f"premise number {index} of many" for index in range(10) for _ in range(3)]
    parted = hold_out(rows_of(premises), {"search": 5, "test": None}, "sentence", seed=1)
    assert set(parted) == {"train", "search"}
    assert len(parted["search"]) == 6  # two whole premises
    assert not set(parted["search"]["sentence"][:]) & set(parted["train"]["sentence"][:])


def test_a_seed_repeats_the_draw_and_another_one_does_not():
    rows = rows_of([f"text {index} stands alone" for index in range(100)])
    draws = [hold_out(rows, {"search": 10}, "sentence", seed)["search"]["label"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0])


@pytest.mark.parametrize(("counts", "message"), [({"search": 0}, "search_rows must be"), ({"test": 6}, "test_rows=6")])
def test_impossible_counts_are_named(counts, message):
    with pytest.raises(ValueError, match=message):
        hold_out(rows_of(SENTENCES), counts, "sentence", seed=0)


def test_training_rows_can_be_kept_disjoint_from_validation(tmp_path):
    for name, texts in {"train": ["shared words", "own words", "shared words"], "validation": ["shared words"]}.items():
        datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 1][: len(texts)]}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    kept = {
        disjoint: len(
            TextClassification(tiny_tokenizer(), str(tmp_path), label_names=("a", "b"), disjoint=disjoint).features(
                "train"
            )
        )
        for disjoint in (False, True)
    }
    assert kept == {False: 3, True: 1}


def test_without_counts_every_row_stays():
    assert len(hold_out(rows_of(PHRASES), {"search": None}, "sentence", seed=0)["train"]) == len(PHRASES)
