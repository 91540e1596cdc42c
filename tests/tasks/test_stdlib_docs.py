"""The standard library's documentation is read, never run; nothing of the validation split is in the training split."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tiny_text import tiny_tokenizer

from lat_optuna.tasks.stdlib_docs import AREAS, LONGEST, SHORTEST, StdlibDocs, passages


@pytest.fixture(scope="module")
def real():
    return passages()


def letters(text):
    return re.sub(r"[\W\d_]+", " ", text).strip().lower()


def test_thousands_of_passages_in_at_least_six_areas(real):
    assert 4000 < len(real["train"]) + len(real["validation"]) < 12000
    for part in real.values():
        counts = Counter(passage.area for passage in part)
        assert len(counts) >= 6
        assert min(counts.values()) > 40
        assert max(counts.values()) < len(part) / 3


def test_passages_are_lines_of_bounded_length(real):
    for passage in (*real["train"], *real["validation"]):
        assert SHORTEST <= len(passage.text.split()) <= LONGEST
        assert "\n" not in passage.text


def test_nothing_occurs_twice_and_no_definition_on_both_sides(real):
    texts = Counter(letters(passage.text) for part in real.values() for passage in part)
    assert max(texts.values()) == 1
    train, validation = ({passage.source for passage in real[split]} for split in ("train", "validation"))
    assert not train & validation


def test_the_same_python_gives_the_same_passages(real):
    assert passages.__wrapped__() == real


def test_every_module_has_one_area():
    modules = Counter(module for text in AREAS.values() for module in text.split())
    assert max(modules.values()) == 1


def test_sources_are_read_and_not_run(tmp_path):
    long = " ".join(f"Sentence {chr(97 + i)} has{' very' * i} few words." for i in range(20))
    docs = {
        "socket.py": f'"""{"Say hello to the socket. " * 3}"""\nraise SystemExit("imported")',
        "json/decoder.py": f'class A:\n  def f(self):\n    """{"Say hello to the decoder! " * 3}"""',
        "json/test/test_all.py": f'"""{"Say hello to the tests of it. " * 3}"""',
        "pathlib.py": f'def f():\n  """Short.\n\n  {long}\n  """',
        "pickle.py": 'def f():\n  """Too short to say much."""',
        "lib2to3/old.py": 'print "Python 2"',
        "shutil.py": f'"""{"The same twelve words in two areas are of no use. " * 2}"""',
        "asyncio/x.py": f'"""{"The same twelve words in two areas are of no use? " * 2}"""',
    }
    for name, text in docs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [passage for part in passages(tmp_path).values() for passage in part]
    assert {passage.source for passage in found} == {"socket:", "json.decoder:A", "pathlib:f"}
    assert {list(AREAS)[passage.area] for passage in found if passage.source == "json.decoder:A"} == {
        "internet data and markup"
    }
    cut = [passage.text for passage in found if passage.source == "pathlib:f"]
    assert len(cut) > 3
    assert all(text.endswith("words.") for text in cut)
    assert set(" ".join(cut).split()) == set(long.split()) | {"Short."}


def test_a_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sources"):
        passages(tmp_path)


def test_it_is_a_task():
    task = StdlibDocs(tiny_tokenizer(), max_length=32, train_rows=20, validation_rows=10, seed=1)
    assert task.label_names == tuple(AREAS)
    assert len(task.features("train")) == 20
    assert len(task.features("validation")) == 10
    assert max(map(len, task.features("train")["input_ids"])) <= 32
    again = StdlibDocs(tiny_tokenizer(), max_length=32, train_rows=5, validation_rows=10, seed=1)
    assert again.fingerprint("validation") == task.fingerprint("validation")
