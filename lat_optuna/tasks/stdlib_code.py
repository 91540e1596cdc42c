"""Real code on every machine with Python: the syntactic role of every name in the standard library's own sources."""

from __future__ import annotations

import ast
import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lat_optuna.tasks.data import hold_out
from lat_optuna.tasks.stdlib_docs import AREAS, VALIDATION_SHARE, fixed_share, sources
from lat_optuna.tasks.token_classification import NO_LABEL, Tagging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lat_optuna.tasks import Split

ROLES = (
    "import",
    "function definition",
    "class definition",
    "base class",
    "decorator",
    "parameter",
    "keyword argument",
    "function call",
    "method call",
    "attribute",
    "attribute assigned",
    "variable assigned",
    "loop variable",
    "exception",
    "use of a parameter",
    "use of a local variable",
    "use of a global",
)
"""What a name can be. The last three look alike where they stand: what tells them apart is elsewhere in the passage."""

LIBRARY = ("networking", "internet data and markup", "files and formats")
"""Areas of :data:`lat_optuna.tasks.stdlib_docs.AREAS` whose modules are read: about a quarter of the library."""

SHORTEST, LONGEST = 16, 72
"""Words (tokens of Python) of a passage."""
FEWEST_NAMES = 4
"""Passages with fewer names that have a role are left out: tables of numbers."""
LONGEST_STRING = 16
"""Characters that are kept of a string: what it says is no matter of syntax."""


class Passage(NamedTuple):
    """Some consecutive lines of code.

    Attributes:
        words: Python's tokens, without comments, layout and documentation strings.
        roles: For each word an index into ``ROLES``; -100 for keywords, operators, numbers and strings, which tell
            themselves what they are.
        source: Module and module-level definition that they stand in: ``"email.message:Message"``.
    """

    words: tuple[str, ...]
    roles: tuple[int, ...]
    source: str


@cache  # reading takes seconds, and a study makes its task several times
def passages(library: Path | None = None) -> Mapping[Split, tuple[Passage, ...]]:
    """Read the standard library's source files; nothing is imported.

    A passage begins with a definition where it can. One that occurs more than once is kept once. All passages of a
    module-level function or class, its methods included, fall on one side of the split, by a hash of its name.

    Args:
        library: Folder of the library's sources; by default that of the running Python.

    Returns:
        Passages of both splits, in the order of the files' names.

    Raises:
        FileNotFoundError: The sources are not there, as in some frozen or embedded Pythons.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    modules = " ".join(AREAS[area] for area in LIBRARY).split()
    found: dict[tuple[str, ...], Passage] = {}
    for path in sorted(sources(library, modules)):
        module = ".".join(path.relative_to(library).with_suffix("").parts)
        for passage in read_code(path.read_bytes(), module):
            found.setdefault(passage.words, passage)
    if not found:
        raise FileNotFoundError(f"{library} holds no sources of Python's standard library to read code from")
    result: dict[Split, list[Passage]] = {"train": [], "validation": []}
    for passage in found.values():
        result["validation" if fixed_share(passage.source) < VALIDATION_SHARE else "train"].append(passage)
    return {split: tuple(part) for split, part in result.items()}


class StdlibCode(Tagging):
    """Which syntactic role does each name of this code have? A token-level task without a corpus.

    Args:
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        max_length: Longest input in tokens; longer passages become several inputs.
        train_rows: Number of passages to draw from the training split; all by default.
        validation_rows: Likewise.
        search_rows: Training passages to hold out as split ``"search"``, whole definitions at a time.
        test_rows: Likewise as split ``"test"``.
        seed: Of the draws. The split itself is fixed.

    Raises:
        FileNotFoundError: This Python comes without its library's sources.
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        max_length: int = 192,
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
                    "tokens": [passage.words for passage in part],
                    "roles": [passage.roles for passage in part],
                    "source": [passage.source for passage in part],
                }
            )
            for split, part in passages().items()
        }
        rows |= hold_out(rows["train"], {"search": search_rows, "test": test_rows}, "source", seed)
        super().__init__(
            "stdlib_code",
            tokenizer_or_checkpoint,
            rows,
            label_names=ROLES,
            tags_column="roles",
            max_length=max_length,
            sample={"train": train_rows, "validation": validation_rows},
            seed=seed,
        )


def read_code(source: bytes, module: str) -> Iterator[Passage]:
    """The passages of one source file; none where it is not code of this Python."""
    try:
        tree = ast.parse(source)
        lines = list(_lines(source, _Roles().of(tree)))
    except (SyntaxError, ValueError, tokenize.TokenError):  # lib2to3 carries files of Python 2
        return
    definitions = {
        line: node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for line in range(min([node.lineno, *(d.lineno for d in node.decorator_list)]), (node.end_lineno or 0) + 1)
    }
    here, before, words = "", "", list[tuple[str, int]]()
    for number, line in lines:
        definition = definitions.get(number, "")
        opens = line[0][0] in ("def", "class", "async", "@") and before != "@"
        before = line[0][0]
        if definition != here or (opens and len(words) >= SHORTEST) or len(words) + len(line) > LONGEST:
            yield from _passage(words, f"{module}:{here}")
            words = []
        here = definition
        words += line
        while len(words) > LONGEST:
            yield from _passage(words[:LONGEST], f"{module}:{here}")
            words = words[LONGEST:]
    yield from _passage(words, f"{module}:{here}")


def _passage(words: list[tuple[str, int]], source: str) -> Iterator[Passage]:
    if len(words) >= SHORTEST and sum(role != NO_LABEL for _, role in words) >= FEWEST_NAMES:
        texts, roles = zip(*words, strict=True)
        yield Passage(texts, roles, source)


def _lines(source: bytes, roles: Mapping[tuple[int, int], str]) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """Logical lines as (line number, words with roles); those that are a string alone are documentation."""
    words: list[tuple[str, int]] = []
    first, before, depth = 0, "", 0
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        kind = tokenize.tok_name[token.type]
        # Newer Pythons take f-strings apart; older ones see one string. One string it is.
        if kind.endswith("STRING_START"):
            depth += 1
            if depth > 1:
                continue
            kind = "STRING"
        elif depth:
            depth -= kind.endswith("STRING_END")
            continue
        if kind == "NEWLINE":
            if words and not (len(words) == 1 and words[0][0][-1] in "'\""):
                yield first, words
            words, before = [], ""
        if kind not in ("NAME", "OP", "NUMBER", "STRING"):
            continue
        first = first if words else token.start[0]
        text = token.string
        if kind == "STRING":
            text = text if len(text) <= LONGEST_STRING else text[: LONGEST_STRING - 1] + text[-1]
        role = None
        if kind == "NAME" and not keyword.iskeyword(text):
            column = len(token.line[: token.start[1]].encode()) if not token.line.isascii() else token.start[1]
            role = {"def": "function definition", "class": "class definition"}.get(before)
            role = role or roles.get((token.start[0], column)) or roles.get((token.start[0], -1))
            if role is None and before == "as":  # the tree does not tell where `except ... as error` has its name
                role = "variable assigned"
        words.append((text, NO_LABEL if role is None else ROLES.index(role)))
        before = text


class _Roles(ast.NodeVisitor):
    """Finds where the names stand: (line, column in bytes) -> role. Column -1: names of the line without another."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], str] = {}
        self.scopes: list[tuple[set[str], set[str]]] = []  # parameters and local variables, function by function

    def of(self, tree: ast.Module) -> dict[tuple[int, int], str]:
        self.visit(tree)
        return self.found

    def _mark(self, node: ast.expr | ast.arg | ast.keyword, role: str) -> None:
        """Give a name its role; an attribute's name ends where its expression ends."""
        if isinstance(node, ast.Attribute):
            place = (node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr.encode()))
        else:
            place = (node.lineno, node.col_offset)
        self.found.setdefault(place, role)

    def _mark_path(self, node: ast.expr | None, role: str) -> None:
        """Give all names of ``a.b.c`` or ``a.b.c(...)`` or a tuple of them a role."""
        if isinstance(node, ast.Tuple):
            for element in node.elts:
                self._mark_path(element, role)
        elif isinstance(node, ast.Call):
            self._mark_path(node.func, role)
            self._visit_all([*node.args, *node.keywords])
        elif isinstance(node, ast.Attribute):
            self._mark(node, role)
            self._mark_path(node.value, role)
        elif isinstance(node, ast.Name):
            self._mark(node, role)
        elif node is not None:
            self.visit(node)

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            return self._mark(node, "variable assigned")
        for parameters, variables in reversed(self.scopes):
            if node.id in parameters:
                return self._mark(node, "use of a parameter")
            if node.id in variables:
                return self._mark(node, "use of a local variable")
        return self._mark(node, "use of a global")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._mark(node, "attribute" if isinstance(node.ctx, ast.Load) else "attribute assigned")
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            self._mark(node.func, "method call")
            self.visit(node.func.value)
        elif isinstance(node.func, ast.Name):
            self._mark(node.func, "function call")
        else:
            self.visit(node.func)
        self._visit_all([*node.args, *node.keywords])

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is not None:
            self._mark(node, "keyword argument")
        self.visit(node.value)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._mark_path(node.target, "loop variable")
        self._visit_all([node.iter, *node.body, *node.orelse])

    visit_AsyncFor = visit_For  # noqa: N815  # ast's own name

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._mark_path(node.target, "loop variable")
        self._visit_all([node.iter, *node.ifs])

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            self.found.setdefault((line, -1), "import")

    visit_ImportFrom = visit_Import  # noqa: N815  # ast's own name

    def visit_Raise(self, node: ast.Raise) -> None:
        self._mark_path(node.exc, "exception")
        if node.cause is not None:
            self.visit(node.cause)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._mark_path(node.type, "exception")
        self._visit_all(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self._mark_path(decorator, "decorator")
        for base in node.bases:
            self._mark_path(base, "base class")
        self._visit_all([*node.keywords, *node.body])

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self._mark_path(decorator, "decorator")
        if node.returns is not None:
            self.visit(node.returns)
        self._function(node.args, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  # ast's own name

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node.args, [node.body])

    def _function(self, arguments: ast.arguments, body: list[ast.stmt] | list[ast.expr]) -> None:
        optional = [arguments.vararg, arguments.kwarg]
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, optional)]
        for parameter in parameters:
            self._mark(parameter, "parameter")
            if parameter.annotation is not None:
                self.visit(parameter.annotation)
        self._visit_all([*arguments.defaults, *filter(None, arguments.kw_defaults)])
        self.scopes.append(({parameter.arg for parameter in parameters}, set(_assigned(body))))
        self._visit_all(body)
        self.scopes.pop()


def _assigned(body: Iterable[ast.AST]) -> Iterator[str]:
    """Names that a function binds itself: not those of functions and classes inside of it, but their names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            yield node.name
            yield from _assigned(node.body)
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif not isinstance(node, ast.Lambda):
            yield from _assigned(ast.iter_child_nodes(node))
