"""Real English on every machine with Python: the standard library's documentation strings, labelled by area."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lat_optuna.tasks.data import hold_out
from lat_optuna.tasks.text_classification import Classification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lat_optuna.tasks import Split

AREAS: dict[str, str] = {
    "data types and text": """
        string re sre_compile sre_constants sre_parse difflib textwrap stringprep struct codecs encodings
        datetime _pydatetime _strptime zoneinfo calendar collections _collections_abc heapq bisect weakref
        _weakrefset types copy pprint reprlib enum graphlib numbers decimal _pydecimal fractions random
        statistics functools operator""",
    "files and formats": """
        pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil
        pickle copyreg _compat_pickle pickletools shelve dbm sqlite3 gzip bz2 lzma _compression compression
        zipfile tarfile csv configparser tomllib netrc plistlib aifc chunk colorsys imghdr sndhdr sunau wave
        xdrlib""",
    "operating system and concurrency": """
        os io _pyio argparse optparse getopt logging getpass curses platform ctypes hashlib hmac secrets gettext
        locale cmd shlex crypt pipes pty tty threading _threading_local multiprocessing concurrent subprocess
        sched queue rlcompleter""",
    "networking": """
        asyncio socket ssl selectors asyncore asynchat webbrowser wsgiref urllib http ftplib imaplib nntplib
        poplib smtplib smtpd telnetlib uuid socketserver xmlrpc ipaddress cgi cgitb nturl2path""",
    "internet data and markup": "email json mailbox mailcap mimetypes base64 quopri uu html xml _markupbase",
    "graphical interfaces": "tkinter idlelib turtle turtledemo",
    "development tools": """
        pydoc doctest unittest lib2to3 bdb pdb profile cProfile pstats timeit trace tracemalloc distutils
        ensurepip venv zipapp""",
    "runtime and language": """
        sysconfig warnings dataclasses contextlib contextvars abc _py_abc traceback inspect annotationlib site
        typing code codeop zipimport pkgutil modulefinder runpy importlib imp ast symtable token keyword
        tokenize tabnanny pyclbr py_compile compileall dis opcode __future__ _sitebuiltins""",
}
"""Area -> its modules, after the chapters of docs.python.org (small neighbouring chapters together). Removed and
superseded modules stand with the chapter that they were once in; a module that this Python lacks is left out."""

SHORTEST, LONGEST = 12, 64
"""Words of a passage. Shorter ones say too little; of the longer ones few would fit into 128 word pieces."""

VALIDATION_SHARE = 0.2


class Passage(NamedTuple):
    """One documentation string, or a part of a long one.

    Attributes:
        text: In one line.
        area: Index into ``AREAS``.
        source: Module and top-level definition that it documents: ``"email.message:Message"``.
    """

    text: str
    area: int
    source: str


@cache  # reading takes seconds, and a study makes its task several times
def passages(library: Path | None = None) -> Mapping[Split, tuple[Passage, ...]]:
    """Read the standard library's documentation strings from its source files; nothing is imported.

    A text that occurs more than once (letter case, digits and punctuation aside) is kept once, or dropped if its
    copies stand in several areas. All passages of a module-level function or class, its methods included, fall on one
    side of the split, by a hash of its name: methods of a class often repeat each other in other words. Modules do
    occur on both sides, so the task is "an unseen definition of a known library".

    Args:
        library: Folder of the library's sources; by default that of the running Python.

    Returns:
        Passages of both splits, in the order of the files' names.

    Raises:
        FileNotFoundError: The sources are not there, as in some frozen or embedded Pythons.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    kept: dict[str, Passage | None] = {}
    for area, modules in enumerate(AREAS.values()):
        for path in sorted(sources(library, modules.split())):
            module = ".".join(path.relative_to(library).with_suffix("").parts)
            for definition, text in _docstrings(path):
                for part in _cut(text):
                    passage = Passage(part, area, f"{module}:{definition}")
                    letters = re.sub(r"[\W\d_]+", " ", part).strip().lower()
                    first = kept.setdefault(letters, passage)
                    if first is not None and first.area != area:
                        kept[letters] = None
    found = [passage for passage in kept.values() if passage is not None]
    if not found:
        raise FileNotFoundError(f"{library} holds no sources of Python's standard library to read documentation from")
    found.sort(key=lambda passage: passage.source)
    held_out = [fixed_share(passage.source) < VALIDATION_SHARE for passage in found]
    return {
        "train": tuple(passage for passage, out in zip(found, held_out, strict=True) if not out),
        "validation": tuple(passage for passage, out in zip(found, held_out, strict=True) if out),
    }


class StdlibDocs(Classification):
    """Which area of the standard library does this documentation string belong to?

    Args:
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        max_length: Longest input in tokens; the rest is cut.
        train_rows: Number of rows to draw from the training split; all by default.
        validation_rows: Likewise.
        search_rows: Training rows to hold out as split ``"search"``, whole definitions at a time.
        test_rows: Likewise as split ``"test"``.
        seed: Of the draw. The split itself is fixed.

    Raises:
        FileNotFoundError: This Python comes without its library's sources.
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        max_length: int = 128,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        search_rows: int | None = None,
        test_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        import datasets

        rows = {
            split: datasets.Dataset.from_dict(
                {
                    "text": [passage.text for passage in part],
                    "label": [passage.area for passage in part],
                    "source": [passage.source for passage in part],
                }
            )
            for split, part in passages().items()
        }
        rows |= hold_out(rows["train"], {"search": search_rows, "test": test_rows}, "source", seed)
        super().__init__(
            "stdlib_docs",
            tokenizer_or_checkpoint,
            rows,
            text_columns=("text",),
            label_names=tuple(AREAS),
            max_length=max_length,
            sample={"train": train_rows, "validation": validation_rows},
            seed=seed,
        )


def sources(library: Path, modules: list[str]) -> Iterator[Path]:
    """The source files of some modules of the standard library, test suites left out."""
    for module in modules:
        if (file := library / f"{module}.py").is_file():
            yield file
        for file in (library / module).rglob("*.py"):
            # Test suites lie inside some packages on some systems and are left out on others.
            if not {"test", "tests", "idle_test"} & set(file.relative_to(library).parts):
                yield file


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Each documentation string of a file with the name of the module-level definition that it stands in."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 carries files of Python 2
        return
    if text := ast.get_docstring(module):
        yield "", text
    for definition in module.body:
        nodes: list[ast.AST] = [definition]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
                text := ast.get_docstring(node)
            ):
                yield getattr(definition, "name", ""), text
            if isinstance(node, ast.ClassDef | ast.If | ast.Try):
                nodes += reversed(node.body)


def _cut(text: str) -> Iterator[str]:
    """Passages of at most ``LONGEST`` words, cut at ends of paragraphs, else of sentences, else anywhere; no rulers."""
    pieces: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"[-=~*_#+]{4,}", " ", text)):
        if len(paragraph.split()) <= LONGEST:
            pieces.append(paragraph.split())
            continue
        for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph):
            words = sentence.split()
            pieces += [words[start : start + LONGEST] for start in range(0, len(words), LONGEST)]
    passage: list[str] = []
    for piece in [*pieces, []]:
        if passage and (not piece or len(passage) + len(piece) > LONGEST):
            if len(passage) >= SHORTEST:
                yield " ".join(passage)
            passage = []
        passage = passage + piece


def fixed_share(source: str) -> float:
    """A fixed number in [0, 1) for a name, the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
