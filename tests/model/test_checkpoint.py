"""A checkpoint is an ordinary one with a file beside it."""

import logging

import pytest
import torch
import transformers
from zoo import CASES, inputs_for

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, is_adapted, load, save
from lat_optuna.model.checkpoint import SIDE_FILE, FrontPoint, SideFile, write_side_file

CHOSEN = LengthConfig((15, 8, 4), 20)
FRONT = (
    FrontPoint((10, 5, 3), 80.0, 0.4, {"latency_ms": 4.0}),
    FrontPoint((14, 7, 6), 85.0, 0.6, {"latency_ms": 7.0}),
    FrontPoint((20, 12, 9), 84.0, 0.6, {"latency_ms": 5.0}),
    FrontPoint((20, 20, 15), 90.0, 0.9),
)
SIDE = SideFile(3, 20, metric="accuracy", front=FRONT, length_config=CHOSEN)


@pytest.fixture
def saved(tmp_path):
    model = adapt(CASES["BertForQuestionAnswering"].build())
    return save(model, tmp_path / "checkpoint", SIDE)


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "ModernBert-mean", "AlbertForMultipleChoice", "ViTModel"])
def test_what_was_saved_comes_back(tmp_path, name):
    model = adapt(CASES[name].build())
    model.length_config = CHOSEN
    batch = inputs_for(model, [12, 5])
    loaded = load(save(model, tmp_path, SIDE)).eval()
    assert is_adapted(loaded)
    assert type(loaded) is type(model)
    assert loaded.length_config == CHOSEN
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])


def test_anyone_can_load_it_as_a_dense_model(saved):
    dense = transformers.AutoModelForQuestionAnswering.from_pretrained(saved).eval()
    assert not is_adapted(dense)
    batch = inputs_for(dense, [12, 5])
    torch.testing.assert_close(dense(**batch)[0], CASES["BertForQuestionAnswering"].build()(**batch)[0])
    assert dense.config.architectures == ["BertForQuestionAnswering"]


def test_the_folder_holds_no_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", SIDE_FILE, "model.safetensors"]


def test_a_tokenizer_is_saved_beside_it(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word"]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    folder = save(adapt(CASES["BertModel"].build()), tmp_path / "checkpoint", SIDE, tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(folder)("word").input_ids == tokenizer("word").input_ids
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize(
    ("wanted", "lengths"),
    [
        ({"budget": 0.5}, (10, 5, 3)),
        ({"budget": 0.6}, (14, 7, 6)),
        ({"budget": 1.0}, (20, 20, 15)),
        ({"latency_ms": 5.0}, (20, 12, 9)),
        ({"latency_ms": 50}, (14, 7, 6)),
        ({"budget": 0.5, "latency_ms": 50}, (10, 5, 3)),
    ],
)
def test_a_budget_picks_the_most_accurate_point_that_fits(saved, wanted, lengths):
    assert load(saved, **wanted).length_config == LengthConfig(lengths, 20)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"budget": 0.3}, r"fits budget 0.3; the cheapest costs 0.4x"),
        ({"latency_ms": 1}, r"fits latency 1 ms; .*the fastest takes 4 ms"),
        ({"budget": 0.5, "latency_ms": 1}, r"fits budget 0.5 and latency 1 ms"),
    ],
)
def test_a_budget_that_nothing_fits_is_an_error(saved, wanted, message):
    with pytest.raises(ValueError, match=message):
        load(saved, **wanted)


def test_without_a_front_there_is_nothing_to_pick(saved):
    write_side_file(saved, SideFile(3, 20))
    assert load(saved).length_config is None
    with pytest.raises(ValueError, match=r"front .* is empty"):
        load(saved, budget=0.5)
    write_side_file(saved, SideFile(3, 20, front=FRONT[-1:]))
    with pytest.raises(ValueError, match=r"no point has a latency"):
        load(saved, latency_ms=5)


def test_without_a_side_file_it_loads_as_dense_with_a_word_about_it(saved, caplog):
    (saved / SIDE_FILE).unlink()
    with caplog.at_level(logging.WARNING, "lat_optuna"):
        model = load(saved)
    assert "no length_adaptive.json" in caplog.text
    assert "loads as dense" in caplog.text
    assert is_adapted(model)
    assert model.length_config is None
    with pytest.raises(ValueError, match="no front to pick a budget from"):
        load(saved, budget=0.5)


def test_another_class_and_options_of_from_pretrained(saved):
    model = load(saved, transformers.AutoModel, attn_implementation="eager", mode="eliminate")
    assert type(model).__name__ == "BertModel"
    assert model.config._attn_implementation == "eager"
    assert model(**inputs_for(model, [20])).last_hidden_state.shape[1] == 4


def test_wrong_folders_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no checkpoint"):
        load(tmp_path / "nowhere")
    write_side_file(saved, SideFile(5, 20))
    with pytest.raises(ValueError, match="for a model of 5 layers, this one has 3"):
        load(saved)
    with pytest.raises(ValueError, match="for a model of 5 layers"):
        save(adapt(CASES["BertModel"].build()), tmp_path / "other", SideFile(5, 20))
    assert not (tmp_path / "other").exists()
