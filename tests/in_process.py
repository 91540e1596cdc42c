"""The command inside of the test's own process: nothing is imported anew, nothing is told about time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from lat_optuna.cli import main


@dataclass(frozen=True)
class Done:
    """What a process would have left."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Done:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return Done(result.exit_code, result.stdout, result.stderr)
