"""Rows from files and hubs, tokenisers, samples and fingerprints: what the tasks share."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lat_optuna.tasks import Split

DataSource = str | os.PathLike[str] | Mapping[str, Any]
"""A folder with one file a split, a mapping split -> file or files, or the name of a data set on the hub."""

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
CHUNK = 1000


def read_rows(data: DataSource, split: str, subset: str | None = None) -> datasets.Dataset:
    """Read one split of a data set.

    Args:
        data: A folder, a mapping from split to path(s), or a name on the hub.
        split: The split's name, or a file's name in the folder. Where there is no such split but one with
            ``_matched`` behind its name, as in MNLI, that one is meant.
        subset: The hub's name for a part of a data set (``"sst2"`` of ``"nyu-mll/glue"``); local data have none.

    Raises:
        FileNotFoundError: Names what is missing, and what is there instead.
        ValueError: A file cannot be read as what its suffix says, or is empty.
    """
    if not isinstance(data, Mapping) and not _is_local(data):
        rows = _from_hub(str(data), split, subset)
    else:
        import datasets

        rows = datasets.concatenate_datasets([_read_file(path) for path in _files(data, split)])
    if not len(rows):
        raise ValueError(f"split {split!r} of {_name(data)} has no rows")
    return rows


def _is_local(data: str | os.PathLike[str]) -> bool:
    path = Path(data).expanduser()
    if path.is_dir():
        return True
    if path.is_file():
        raise ValueError(
            f"{path} is one file: give its folder, or a mapping such as {{'train': ..., 'validation': ...}}"
        )
    if isinstance(data, os.PathLike) or path.is_absolute() or str(data).startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"the data folder {path} does not exist")
    return False


def _files(data: DataSource, split: str) -> list[Path]:
    if isinstance(data, Mapping):
        if split not in data:
            raise FileNotFoundError(f"the data have no split {split!r}; there is {', '.join(map(str, data)) or 'none'}")
        paths = [data[split]] if isinstance(data[split], str | os.PathLike) else list(data[split])
        files = [Path(path).expanduser() for path in paths]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"the data file {file} of split {split!r} does not exist")
        return files
    folder = Path(data).expanduser()
    names = [split] + [f"{stem}{suffix}" for stem in (split, f"{split}_matched") for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
    there = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    raise FileNotFoundError(
        f"{folder} has no file for split {split!r} ({split}{f', {split}'.join(SUFFIXES)}); "
        f"there is {', '.join(there) or 'no data file at all'}"
    )


def _read_file(path: Path) -> datasets.Dataset:
    """A file as rows in memory. No copy is left in a cache, which may be read-only, or shared by many workers."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return datasets.Dataset(pq.read_table(path))
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
                rows = [dict(row) for row in reader]
        elif suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            rows = (
                json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
            )
        else:
            raise ValueError(f"its name does not end in {', '.join(SUFFIXES)}")
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, AttributeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"cannot read the data file {path}: {str(error).splitlines()[0]}") from error


def _from_hub(name: str, split: str, subset: str | None) -> datasets.Dataset:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # the libraries below raise whatever they met: HTTP, parsing, permission, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = name if subset is None else f"{name} ({subset})"
        raise FileNotFoundError(
            f"no folder is called {name!r}, and the data set {where} could not be had from the hub: {reason}"
        ) from error
    for found in (split, f"{split}_matched"):
        if found in loaded:
            return loaded[found]
    raise FileNotFoundError(f"the data set {name!r} has no split {split!r}; there is {', '.join(map(str, loaded))}")


def _name(data: DataSource) -> str:
    return "the data" if isinstance(data, Mapping) else str(data)


def data_name(data: DataSource, subset: str | None = None) -> str:
    """A short name for titles: ``"sst2"`` for the folder ``.../sst2``, ``"glue/sst2"`` for the hub's."""
    if isinstance(data, Mapping):
        first = next(iter(data.values()), "data")
        path = Path(first if isinstance(first, str | os.PathLike) else next(iter(first), "data"))
        return path.parent.name or path.stem
    path = Path(data).expanduser()
    name = path.resolve().name if path.is_dir() else str(data).removeprefix("nyu-mll/")
    return name if subset is None else f"{name}/{subset}"


def need_columns(rows: datasets.Dataset, columns: Iterable[str], what: str) -> None:
    """Raise a ``ValueError`` that names the first column that ``rows`` lack or that has empty cells."""
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"{what} has no column {column!r}; there is {', '.join(rows.column_names)}")
        if rows.data.column(column).null_count:
            empty = next(i for i, value in enumerate(rows[column][:]) if value is None)
            raise ValueError(f"{what}: column {column!r} is empty in row {empty}")


def sample_rows(rows: datasets.Dataset, count: int | None, seed: int, what: str) -> datasets.Dataset:
    """``count`` rows drawn without replacement, in their old order; all rows if there are no more, or for ``None``."""
    if count is None:
        return rows
    if count < 1:
        raise ValueError(f"{what} must be at least 1, not {count}")
    if count >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def hold_out(
    rows: datasets.Dataset, counts: Mapping[Split, int | None], column: str, seed: int, named: str = "{}_rows"
) -> dict[Split, datasets.Dataset]:
    """Part training rows into those that stay and those held out, with no text on both sides.

    Whole texts are drawn, with all of their rows, until a split has its count. A text that is part of a longer one (as
    SST-2's phrases are parts of its sentences) is never drawn, and not trained on when that longer one is held out.

    Args:
        rows: The training rows.
        counts: Split -> rows to hold out (a few more, if the last text has several); nothing where it is ``None``.
        column: The text that must not stand on both sides: a sentence, a premise, a context.
        seed: Of the draw.
        named: The setting that holds a split's count, for errors.

    Returns:
        ``"train"`` and the splits of ``counts`` that were asked for, each in the old order.

    Raises:
        ValueError: Nothing would be left to train on, or a count is below 1.
    """
    wanted = {split: count for split, count in counts.items() if count is not None}
    for split, count in wanted.items():
        if count < 1:
            raise ValueError(f"{named.format(split)} must be at least 1, not {count}")
    if not wanted:
        return {"train": rows}
    texts = rows[column][:]
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    whole = [text for text, part in zip(rows_of, _parts_of(rows_of, rows_of), strict=True) if not part]
    random.Random(seed).shuffle(whole)
    left = iter(whole)
    held: dict[Split, list[str]] = {split: [] for split in wanted}
    for split, count in wanted.items():
        found = 0
        while found < count and (text := next(left, None)) is not None:
            held[split].append(text)
            found += len(rows_of[text])
    out = {text for part in held.values() for text in part}
    out |= {text for text, part in zip(rows_of, _parts_of(rows_of, out), strict=True) if part}
    stay = [row for row, text in enumerate(texts) if text not in out]
    if not stay or next(left, None) is None:
        asked = " and ".join(f"{named.format(split)}={count}" for split, count in wanted.items())
        raise ValueError(f"{asked} of {len(rows)} training rows leave nothing to train on")
    taken = {split: sorted(row for text in part for row in rows_of[text]) for split, part in held.items()}
    return {split: rows.select(chosen) for split, chosen in {"train": stay, **taken}.items()}


def _parts_of(texts: Iterable[str], others: Iterable[str]) -> list[bool]:
    """Whether each text is a proper part, by whole words, of one of the others."""
    padded = [f" {' '.join(other.split())} " for other in others]
    holding: dict[str, list[int]] = {}
    for index, other in enumerate(padded):
        for word in set(other.split()):
            holding.setdefault(word, []).append(index)
    result = []
    for text in texts:
        words = text.split()
        rarest = min((holding.get(word, []) for word in words), key=len, default=[])
        part = f" {' '.join(words)} "
        result.append(any(len(padded[index]) > len(part) and part in padded[index] for index in rarest))
    return result


def load_tokenizer(tokenizer_or_checkpoint: str | PreTrainedTokenizerBase, max_length: int) -> PreTrainedTokenizerBase:
    """A fast tokeniser that can make inputs of ``max_length`` tokens.

    Raises:
        FileNotFoundError: There is no tokeniser under that name.
        ValueError: The tokeniser is a slow one, or ``max_length`` is out of its range.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    tokenizer = tokenizer_or_checkpoint
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_or_checkpoint))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(_no_checkpoint("tokenizer", tokenizer_or_checkpoint, error)) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if not special < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length must lie between {special + 1} and the tokenizer's limit of {tokenizer.model_max_length}, "
            f"not {max_length}"
        )
    return tokenizer


def load_model(auto_class: Any, checkpoint: str, **settings: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` in fp32; a head of another size or kind gives way to a new one.

    Raises:
        FileNotFoundError: There is no model under that name.
    """
    import torch

    try:
        return auto_class.from_pretrained(
            str(checkpoint), dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_no_checkpoint("model", checkpoint, error)) from error


def _no_checkpoint(kind: str, name: Any, error: Exception) -> str:
    if Path(name).expanduser().is_dir():
        return f"the folder {name} holds no {kind} that transformers can load: {str(error).splitlines()[0]}"
    return f"there is no folder {name}, and no {kind} of that name could be had from the hub"


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], labels: Sequence[int], max_length: int
) -> datasets.Dataset:
    """Tokenise texts (or pairs of texts, as two sequences): truncated, never padded.

    Whatever truncation and padding a ``tokenizer.json`` brings along is overruled.
    """
    import datasets
    import pyarrow as pa

    tables = []
    for start in range(0, len(labels), CHUNK):
        columns = tokenizer(
            *[side[start : start + CHUNK] for side in texts],
            truncation=True,
            padding=False,
            max_length=max_length,
            return_attention_mask=True,
        )
        tables.append(token_table(columns, {"labels": labels[start : start + CHUNK]}))
    return datasets.Dataset(pa.concat_tables(tables))


def token_table(columns: Mapping[str, Sequence[Sequence[int]]], labels: Mapping[str, Sequence[int]]) -> Any:
    """Lists of tokens and columns of labels as an Arrow table with small integers."""
    import pyarrow as pa

    arrays = {
        name: pa.array(values, pa.list_(pa.int32() if name == "input_ids" else pa.int8()))
        for name, values in columns.items()
    }
    return pa.table(arrays | {name: pa.array(values, pa.int64()) for name, values in labels.items()})


def fingerprint(features: datasets.Dataset, settings: Mapping[str, Any]) -> str:
    """Sha256 of the features' content and of ``settings`` (JSON): the same on every machine.

    The tokens stand for the texts, the tokeniser and the truncation: a tokeniser that was saved and loaded, or data
    that moved into another kind of file, change nothing.
    """
    import numpy as np

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(features.column_names):
        column = features.data.column(name).combine_chunks()
        digest.update(name.encode())
        if hasattr(column, "offsets"):
            digest.update(np.diff(column.offsets.to_numpy()).astype("<i4").tobytes())
            column = column.flatten()
        digest.update(column.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
    return digest.hexdigest()


def overlap(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far predicted distributions agree: ``100 sum_c min(p_c, q_c)``, which is 100 less their total variation.

    Args:
        logits: Distributions lie along the last axis: classes, or places of an answer.
        others: As many others.

    Returns:
        Percent, in fp64; the shape of the leading axes.
    """
    import numpy as np

    p, q = (np.exp(x - x.max(-1, keepdims=True)).astype(np.float64) for x in (logits, others))
    return np.asarray(100.0 * np.minimum(p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)).sum(-1))
