"""Attention on a CPU, votes and choice of rows included in a layer that drops: ``cpu_kernels.cpp``.

It is compiled for this processor when first needed, which takes some seconds, and kept in the user's cache: a library
that gives torch the operators of ``kernels.py`` for CPUs. Without a C++ compiler, or where the compiler cannot make it
(it needs torch 2.10), there are no such kernels, and torch's operators do the work.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TORCH = Path(torch.__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)


def fits(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries: all but double precision."""
    return query.dtype in DTYPES


def takes(votes: torch.Tensor) -> bool:
    """Whether :func:`choose` takes such votes."""
    return votes.dtype == torch.float32


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels are there; compiles them where they are not yet."""
    return _loaded()


@functools.cache
def _loaded() -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix="lat_optuna-") as folder:
            torch.ops.load_library(_library(Path(folder)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _logger.info("layers that drop take longer, as there are no kernels for this CPU: %s", reason)
        return False
    return True


def _library(folder: Path) -> Path:
    """The library in the user's cache, or newly made, under a name that tells source, compiler, processor and torch.

    Args:
        folder: Where it stays if the cache cannot keep it.

    Raises:
        OSError: There is no compiler.
        subprocess.SubprocessError: The compiler cannot make it.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or sys.platform != "linux":
        raise OSError(f"they are for Linux with one of the compilers {', '.join(COMPILERS)}")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    processor = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    made_from = (SOURCE.read_text(), version, *FLAGS, processor[0] if processor else "", torch.__version__, str(TORCH))
    name = f"cpu_kernels-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:20]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lat_optuna"
    kept = cache / name
    if kept.exists():
        return kept
    made = folder / name
    of_torch = (f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu")
    subprocess.run([compiler, *FLAGS, "-o", made, SOURCE, *of_torch], capture_output=True, check=True, text=True)
    try:  # whole or not at all, as other processes may be at it, too
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(shutil.copy(made, cache / f"{name}.{os.getpid()}"))
        return partial.replace(kept)
    except OSError:  # no place of the user's: the next process makes it again
        return made
