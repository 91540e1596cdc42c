"""Attention of a layer that drops on a CPU, votes and choice of rows included: ``cpu_kernels.cpp``.

It is compiled for this processor when first needed, which takes a second, and kept in the user's cache. Without a C++
compiler, or where the compiler cannot make it, there are no such kernels, and torch's operators do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lat_optuna.model.rows import Attended, Chosen, empty_choice

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
KINDS = {torch.float32: 0, torch.bfloat16: 1}

_logger = logging.getLogger(__name__)


def fits(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries: all but double precision."""
    return query.dtype in (*KINDS, torch.float16)


def takes(votes: torch.Tensor) -> bool:
    """Whether :func:`choose` takes such votes."""
    return votes.dtype == torch.float32


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels are there; compiles them where they are not yet."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    try:
        loaded = _load()
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _logger.info("layers that drop take longer, as there are no kernels for this CPU: %s", reason)
        return None
    number, address, of = ctypes.c_int, ctypes.c_void_p, ctypes.POINTER
    loaded.received.argtypes = [number, of(_Projections), address]
    loaded.attend_and_choose.argtypes = [number, of(_Projections), of(_Chooser), address]
    loaded.choose.argtypes = [address, of(_Chooser), ctypes.c_int64]
    loaded.received.restype = loaded.attend_and_choose.restype = loaded.choose.restype = None
    return loaded


def _load() -> ctypes.CDLL:
    """The library from the user's cache, or newly made, under a name that tells source, compiler and processor.

    Raises:
        OSError: There is no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: The compiler cannot make it.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or sys.platform != "linux":
        raise OSError(f"they are for Linux with one of the compilers {', '.join(COMPILERS)}")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    processor = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    made_from = (SOURCE.read_text(), version, *FLAGS, processor[0] if processor else "")
    name = f"cpu_kernels-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:20]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lat_optuna"
    kept = cache / name
    if kept.exists():
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="lat_optuna-") as folder:
        made = Path(folder, name)
        subprocess.run([compiler, *FLAGS, "-o", made, SOURCE], capture_output=True, check=True, text=True)
        try:  # whole or not at all, as other processes may be at it, too
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(shutil.copy(made, cache / f"{name}.{os.getpid()}"))
            made = partial.replace(kept)
        except OSError:  # no place of the user's: the next process makes it again
            pass
        return ctypes.CDLL(str(made))


def received(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`lat_optuna.model.kernels.received`."""
    query, key = _readable(query), _readable(key)
    made = torch.empty(query.shape[:3], dtype=torch.float32)
    real = None if real is None else real.contiguous()
    _library().received(KINDS[query.dtype], _projections(query, key, key, allowed, real), made.data_ptr())
    return made.sum(1)


def attend_and_choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    real: torch.Tensor | None,
    counts: torch.Tensor | None,
    positions: torch.Tensor | None,
    width: int,
    protected: int,
    tokens: int,
) -> Attended:
    """See :func:`lat_optuna.model.kernels.attend_and_choose`."""
    dtype = value.dtype
    query, key, value = _readable(query), _readable(key), _readable(value)
    batch, heads, n, size = query.shape
    made = empty_choice(query, width)
    context = torch.empty((batch, width, heads * size), dtype=value.dtype)
    real, counts, positions = _contiguous(real), _contiguous(counts), _contiguous(positions)
    _library().attend_and_choose(
        KINDS[query.dtype],
        _projections(query, key, value, allowed, real),
        _Chooser(*map(_address, (real, counts, positions, *made)), n, width, protected, tokens),
        context.data_ptr(),
    )
    return context.to(dtype), *made


def choose(
    votes: torch.Tensor,
    real: torch.Tensor | None,
    counts: torch.Tensor | None,
    positions: torch.Tensor | None,
    width: int,
    protected: int,
    tokens: int,
) -> Chosen:
    """See :func:`lat_optuna.model.kernels.choose`."""
    batch, n = votes.shape
    made = empty_choice(votes, width)
    votes, real, counts, positions = votes.contiguous(), *map(_contiguous, (real, counts, positions))
    chooser = _Chooser(*map(_address, (real, counts, positions, *made)), n, width, protected, tokens)
    _library().choose(votes.data_ptr(), chooser, batch)
    return made


class _Projections(ctypes.Structure):
    """``Projections`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "allowed", "real")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "size")),
        ("scale", ctypes.c_double),
        ("strides", ctypes.c_int64 * 16),
    ]


class _Chooser(ctypes.Structure):
    """``Chooser`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("real", "counts", "positions")),
        *((f"to_{name}", ctypes.c_void_p) for name in ("rows", "positions", "real", "flat")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "protected", "tokens")),
    ]


def _projections(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> _Projections:
    batch, heads, n, size = query.shape
    of_allowed = (0, 0, 0, 0) if allowed is None else allowed.expand(batch, heads, n, n).stride()
    strides = (*query.stride(), *key.stride(), *value.stride(), *of_allowed)
    addresses = map(_address, (query, key, value, allowed, real))
    # By log2(e), too: powers of two are what is cheap.
    return _Projections(*addresses, batch, heads, n, size, size**-0.5 * math.log2(math.e), strides)


def _readable(projection: torch.Tensor) -> torch.Tensor:
    if projection.dtype == torch.float16:
        projection = projection.float()
    return projection if projection.stride(3) == 1 else projection.contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
