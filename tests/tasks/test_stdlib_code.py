"""The standard library's code is read, never run; names have the roles that Python's grammar gives them."""

from __future__ import annotations

import keyword
from collections import Counter

import pytest
from tiny_text import tiny_tokenizer

from lat_optuna.tasks.stdlib_code import (
    FEWEST_NAMES,
    LONGEST,
    NO_LABEL,
    ROLES,
    SHORTEST,
    StdlibCode,
    passages,
    read_code,
)

CODE = '''
"""Documentation is left out."""
from os import path as p
import sys
import re, json, math, time, string, token

@cache.wrap(limit=3)  # and so are comments
def grow(tree, *rest, by: int = one, **more):
    """A documentation string."""
    taller = tree.height + by
    tree.height = taller
    for branch in tree.branches(sys.depth):
        try:
            plant(branch, "a string that is longer than sixteen", where=taller)
        except nature.Error as error:
            raise Failure(error) from None
    return [leaf for leaf in rest if (lambda x: x)(leaf)]

class Oak(Tree, metaclass=Meta):
    size, leaves = 3, many
'''


def roles_of(code):
    found = {}
    for passage in read_code(code.encode(), "m"):
        for word, role in zip(passage.words, passage.roles, strict=True):
            found.setdefault(word, []).append(None if role == NO_LABEL else ROLES[role])
    return found


def test_names_have_their_roles():
    found = roles_of(CODE)
    assert found["grow"] == ["function definition"]
    assert found["Oak"] == ["class definition"]
    assert found["Tree"] == ["base class"]
    assert found["cache"] == found["wrap"] == ["decorator"]
    assert found["limit"] == ["keyword argument"]
    assert found["metaclass"] == ["keyword argument"]
    assert found["p"] == found["path"] == ["import"]
    assert found["os"] == ["import"]
    assert found["sys"] == ["import", "use of a global"]
    assert found["tree"] == ["parameter", *["use of a parameter"] * 3]
    assert found["rest"] == ["parameter", "use of a parameter"]
    assert found["more"] == ["parameter"]
    assert found["by"] == ["parameter", "use of a parameter"]
    assert found["int"] == found["one"] == ["use of a global"]
    assert found["height"] == ["attribute", "attribute assigned"]
    assert found["branches"] == ["method call"]
    assert found["taller"] == ["variable assigned", "use of a local variable", "use of a local variable"]
    assert found["branch"] == ["loop variable", "use of a local variable"]
    assert found["leaf"] == ["use of a local variable", "loop variable", "use of a local variable"]
    assert found["plant"] == ["function call"]
    assert found["where"] == ["keyword argument"]
    assert found["nature"] == found["Error"] == found["Failure"] == ["exception"]
    assert found["error"] == ["variable assigned", "use of a local variable"]
    assert found["x"] == ["parameter", "use of a parameter"]
    assert found["size"] == ["variable assigned"]


def test_what_tells_itself_what_it_is_has_no_role():
    found = roles_of(CODE)
    for word in ("def", "for", "(", "=", "3", "None", "return", '"a string that "'):
        assert set(found[word]) == {None}, word
    assert not any("ocumentation" in word or "comment" in word for word in found)


def test_columns_are_counted_right_behind_other_alphabets():
    assert roles_of("def f(ä, b):\n    return 'éé', ä, self.ü.w, b, f(b), g(a), h\n")["w"] == ["attribute"]


def test_a_string_is_one_word_in_every_python():
    found = roles_of("def f(a, b, c):\n    return a(f'{b!r} and {c}'), b, c, g(a), g(b), g(c)\n")
    assert [word for word in found if "'" in word] == ["f'{b!r} and {c}'"]


def test_code_of_another_python_is_passed_over():
    assert not list(read_code(b"print 'Python 2'", "m"))
    assert not list(read_code(b"\xff\xfe", "m"))


@pytest.fixture(scope="module")
def real():
    return passages()


def test_thousands_of_passages_with_every_role(real):
    assert 5000 < len(real["train"]) + len(real["validation"]) < 15000
    for part in real.values():
        roles = Counter(role for passage in part for role in passage.roles if role != NO_LABEL)
        assert len(roles) == len(ROLES)
        assert max(roles.values()) < sum(roles.values()) / 3
        for passage in part:
            assert SHORTEST <= len(passage.words) == len(passage.roles) <= LONGEST
            assert sum(role != NO_LABEL for role in passage.roles) >= FEWEST_NAMES


def test_names_without_a_role_are_rare(real):
    names = [
        role
        for passage in real["train"]
        for word, role in zip(passage.words, passage.roles, strict=True)
        if word.isidentifier() and not keyword.iskeyword(word)
    ]
    assert names.count(NO_LABEL) < 0.01 * len(names)


def test_nothing_occurs_twice_and_no_definition_on_both_sides(real):
    words = Counter(passage.words for part in real.values() for passage in part)
    assert max(words.values()) == 1
    train, validation = ({passage.source for passage in real[split]} for split in ("train", "validation"))
    assert not train & validation


def test_a_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sources"):
        passages(tmp_path)


def test_it_is_a_task(real):
    task = StdlibCode(tiny_tokenizer(), max_length=96, train_rows=20, validation_rows=10, test_rows=30, seed=1)
    assert task.metric_name == "accuracy"
    assert len(task.features("train")) >= 20
    assert max(map(len, task.features("train")["input_ids"])) <= 96
    labels = [label for labels in task.features("validation")["labels"] for label in labels if label != NO_LABEL]
    assert len(labels) >= 10 * FEWEST_NAMES
    again = StdlibCode(tiny_tokenizer(), max_length=96, train_rows=5, validation_rows=10, seed=1)
    assert again.fingerprint("validation") == task.fingerprint("validation")
