"""Text classification reads every form of data alike, cuts and never pads, and says what is wrong with the rest."""

from __future__ import annotations

import csv
import json

import datasets
import numpy as np
import pytest
import torch
from tiny_text import sentences, tiny_checkpoint, tiny_tokenizer, write_parquet
from transformers.modeling_outputs import SequenceClassifierOutput

from lat_optuna.tasks import data as data_module
from lat_optuna.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tmp_path):
    write_parquet(tmp_path / "train.parquet", sentences(30, seed=1))
    write_parquet(tmp_path / "validation.parquet", sentences(20, seed=2))
    return tmp_path


def write_as(suffix, path, rows):
    path = path.with_suffix(suffix)
    if suffix == ".parquet":
        write_parquet(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_the_kind_of_file_makes_no_difference(tokenizer, tmp_path, suffix):
    rows = [*sentences(10), {"sentence": 'bad,\t"bad"\n film', "label": 1}, {"sentence": "007", "label": 0}]
    for kind in (".parquet", suffix):
        folder = tmp_path / kind[1:]
        folder.mkdir(exist_ok=True)
        for split in ("train", "validation"):
            write_as(kind, folder / split, rows)
    one, other = (TextClassification(tokenizer, tmp_path / kind) for kind in ("parquet", suffix[1:]))
    assert one.fingerprint("validation") == other.fingerprint("validation")
    assert other.features("train")["labels"][:] == [row["label"] for row in rows]


def test_features_are_cut_at_max_length_and_never_padded(tokenizer, folder):
    task = TextClassification(tokenizer, folder, max_length=8)
    assert task.features("validation").num_rows == 20
    for row, feature in zip(sentences(20, seed=2), task.features("validation"), strict=True):
        words = tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert words == ["[CLS]", *row["sentence"].split()[:6], "[SEP]"]
        assert feature["attention_mask"] == [1] * len(words)


def test_a_batch_is_as_wide_as_its_longest_example(tokenizer, folder):
    task = TextClassification(tokenizer, folder)
    features = [task.features("validation")[i] for i in range(5)]
    batch = task.collate(features)
    longest = max(len(feature["input_ids"]) for feature in features)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, longest)
    assert batch["attention_mask"].sum(-1).tolist() == [len(feature["input_ids"]) for feature in features]
    assert batch["labels"].tolist() == [feature["labels"] for feature in features]


def test_pairs_become_one_input_with_two_segments(tokenizer, tmp_path):
    rows = [{"premise": "good film", "hypothesis": "not bad", "label": label} for label in (0, 1, 2)]
    write_parquet(tmp_path / "validation_matched.parquet", rows)
    write_parquet(tmp_path / "validation_mismatched.parquet", rows[:1])
    task = TextClassification(tokenizer, tmp_path, train_split=None)
    assert len(task.features("validation")) == 3
    feature = task.features("validation")[0]
    words = ["[CLS]", "good", "film", "[SEP]", "not", "bad", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == words
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_splits_may_be_named_by_file_or_mapped_to_files(tokenizer, folder):
    by_name = TextClassification(tokenizer, folder)
    by_file = TextClassification(tokenizer, folder, train_split="train.parquet", validation_split="validation.parquet")
    both = {"train": [folder / "train.parquet", folder / "validation.parquet"], "validation": folder / "train.parquet"}
    mapped = TextClassification(tokenizer, both)
    assert by_name.fingerprint("train") == by_file.fingerprint("train") == mapped.fingerprint("validation")
    assert len(mapped.features("train")) == 50


def test_names_of_labels_reach_the_model(tokenizer, tmp_path):
    rows = [{"text": "good", "mood": "happy"}, {"text": "bad", "mood": "sad"}, {"text": "dull", "mood": "bored"}]
    write_parquet(tmp_path / "data" / "train.parquet", rows[:2])
    write_parquet(tmp_path / "data" / "validation.parquet", rows)
    checkpoint = tiny_checkpoint(tmp_path / "model")
    task = TextClassification(checkpoint, tmp_path / "data", label_column="mood")
    assert task.features("train")["labels"][:] == [1, 2]
    model = task.build_model(checkpoint)
    assert model.config.id2label == {0: "bored", 1: "happy", 2: "sad"}
    assert model.classifier.out_features == 3
    assert model.dtype == torch.float32
    reordered = TextClassification(
        checkpoint, tmp_path / "data", label_column="mood", label_names=("sad", "bored", "happy")
    )
    assert reordered.features("train")["labels"][:] == [2, 0]


def test_samples_are_drawn_by_seed_and_keep_their_order(tokenizer, folder):
    def drawn(**settings):
        return TextClassification(tokenizer, folder, **settings).features("train")["input_ids"][:]

    everything, some = drawn(), drawn(train_rows=12, seed=3)
    assert len(some) == 12
    positions = [everything.index(tokens) for tokens in some if everything.count(tokens) == 1]
    assert positions == sorted(positions)
    assert some == drawn(train_rows=12, seed=3) != drawn(train_rows=12, seed=4)
    assert drawn(train_rows=1000) == everything


def test_the_hub_is_asked_for_what_is_no_folder(tokenizer, monkeypatch):
    asked = []
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )
    part = datasets.Dataset.from_dict({"premise": ["good"], "hypothesis": ["bad"], "label": [2]}, features=features)

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict({"train": part, "validation_matched": part, "test_matched": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TextClassification(tokenizer, "mnli")
    assert set(asked) == {("nyu-mll/glue", "mnli")}
    assert task.name == "glue/mnli"
    assert task.label_names == ("entailment", "neutral", "contradiction")
    assert task.features("validation")["labels"][:] == [2]


def test_the_hub_s_reader_takes_a_folder_of_the_same_form(tokenizer, folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    local = TextClassification(tokenizer, folder)
    monkeypatch.setattr(data_module, "_is_local", lambda data: False)
    as_hub = TextClassification(tokenizer, str(folder))
    for split in ("train", "validation"):
        assert as_hub.fingerprint(split) == local.fingerprint(split)
    with pytest.raises(FileNotFoundError, match=r"no split 'tset'; there is train, validation"):
        TextClassification(tokenizer, str(folder), validation_split="tset")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tokenizer, monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("no route to the hub\nand a lot more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"no folder is called 'data/sst3'.*no route to the hub$"):
        TextClassification(tokenizer, "data/sst3")


def test_the_fingerprint_covers_content_and_settings(tokenizer, folder, tmp_path_factory):
    task = TextClassification(tokenizer, folder)
    prints = {
        task.fingerprint("validation"),
        task.fingerprint("train"),
        TextClassification(tokenizer, folder, max_length=9).fingerprint("validation"),
        TextClassification(tokenizer, folder, validation_rows=10).fingerprint("validation"),
        TextClassification(tokenizer, folder, label_names=("no", "yes")).fingerprint("validation"),
    }
    assert len(prints) == 5
    rows = sentences(20, seed=2)
    rows[7]["label"] = 1 - rows[7]["label"]
    write_parquet(folder / "flipped.parquet", rows)
    rows[7]["label"] = 1 - rows[7]["label"]
    write_parquet(folder / "same.parquet", rows)
    assert TextClassification(tokenizer, folder, validation_split="flipped").fingerprint("validation") not in prints
    saved = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(saved)
    again = TextClassification(str(saved), folder, validation_split="same")
    assert again.fingerprint("validation") == task.fingerprint("validation")


def test_accuracy_and_log_probabilities(tokenizer, folder):
    task = TextClassification(tokenizer, folder)
    labels = np.asarray(task.features("validation")["labels"][:])
    right = [np.eye(2, dtype=np.float32)[label] for label in labels]
    assert task.score("validation", right) == {"accuracy": 100.0}
    assert task.score("validation", [*(1 - row for row in right[:5]), *right[5:]]) == {"accuracy": 75.0}
    assert np.isnan(task.score("validation", [*right[:-1], np.array([np.nan, 0])])["accuracy"])
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    batch = {"labels": torch.tensor([0, 1])}
    outputs = SequenceClassifierOutput(logits=logits)
    expected = [np.log(0.5), np.log(np.exp(-1) / (np.exp(2) + np.exp(-1)))]
    assert task.log_probs(outputs, batch).tolist() == pytest.approx(expected)
    assert [row.tolist() for row in task.predictions(outputs, batch)] == logits.tolist()


def test_agreement_is_what_two_distributions_share(tokenizer, folder):
    task = TextClassification(tokenizer, folder)
    ours, full = np.log([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]]), np.log([[0.2, 0.8], [0.5, 0.5], [0.1, 0.9]]) + 1e3
    assert task.agreement("validation", range(3), [*ours], [*full]) == pytest.approx([50, 100, 100])
    assert task.agreement("validation", [0], [np.array([1e4, 0.0])], [np.array([0.0, 1e4])]) == pytest.approx([0])
    assert np.isnan(task.agreement("validation", [0], [np.array([np.nan, 0.0])], [np.zeros(2)])).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "./nothing"}, FileNotFoundError, "the data folder nothing does not exist"),
        ({"validation_split": "test"}, FileNotFoundError, r"no file for split 'test'.*train\.parquet, validation\.par"),
        ({"text_columns": ("text",)}, ValueError, r"split 'train' has no column 'text'; there is sentence, label"),
        ({"label_column": "y"}, ValueError, r"split 'train' has no column 'y'; there is sentence, label"),
        ({"text_columns": ()}, ValueError, "one column or two"),
        ({"train_rows": 0}, ValueError, "train_rows must be at least 1, not 0"),
        ({"max_length": 513}, ValueError, "limit of 512, not 513"),
        ({"max_length": 2}, ValueError, "not 2"),
        ({"label_names": ("one",)}, ValueError, "two or more classes"),
        ({"train_split": None, "validation_split": None}, ValueError, "both None"),
        ({"data": "stsb"}, ValueError, "regression"),
        ({"data": {"validation": "x.csv"}}, FileNotFoundError, "no split 'train'; there is validation"),
        ({"data": {"train": "missing.csv"}}, FileNotFoundError, r"data file missing\.csv of split 'train'"),
    ],
)
def test_bad_input_is_named(tokenizer, folder, settings, error, message):
    with pytest.raises(error, match=message):
        TextClassification(tokenizer, **{"data": folder, **settings})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "good", "label": -1}], "holds the label -1"),
        ([{"text": "good", "label": 0.5}], "holds the label 0.5"),
        ([{"text": None, "label": 1}, {"text": "bad", "label": 0}], "column 'text' is empty in row 0"),
        ([{"text": "good", "label": 1}, {"text": "bad", "label": None}], "column 'label' is empty in row 1"),
        ([{"words": "good", "label": 1}], "which columns hold the texts"),
        ([{"text": "good", "label": "a"}], "two or more classes"),
    ],
)
def test_rows_that_make_no_task_are_named(tokenizer, tmp_path, rows, message):
    write_parquet(tmp_path / "validation.parquet", rows)
    with pytest.raises(ValueError, match=message):
        TextClassification(tokenizer, tmp_path, train_split=None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("validation.parquet", "PAR"),
        ("validation.jsonl", "{'a'"),
        ("validation.csv", 'a,b\n"x'),
        ("validation.json", ""),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_named(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}|no rows"):
        TextClassification(tokenizer, tmp_path, train_split=None)


def test_a_missing_checkpoint_is_named(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        TextClassification(str(folder), folder)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        TextClassification(tiny_tokenizer(), folder).build_model(str(folder))
