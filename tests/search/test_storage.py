"""Storage URLs: what is opened, how, and what is refused in one clear line."""

from __future__ import annotations

import os
import sqlite3
from collections import namedtuple

import optuna
import psutil
import pytest
import sqlalchemy

from lat_optuna.search import storage as storage_module
from lat_optuna.search.storage import network_file_system, open_storage, redact, retrying

optuna.logging.set_verbosity(optuna.logging.WARNING)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me:p@ss:w@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("cannot reach postgresql://me:secret@host/db at all", "cannot reach postgresql://me:***@host/db at all"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
        ("grpc://host:13000", "grpc://host:13000"),
    ],
)
def test_passwords_are_never_shown(text, shown):
    assert redact(text) == shown


def test_errors_of_a_server_show_no_password():
    with pytest.raises(ConnectionError) as error:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "secret" not in one_line(error)
    assert "me:***@127.0.0.1:1" in one_line(error)
    assert error.value.__cause__ is None  # a traceback would show it


# ---------------------------------------------------------------------- SQLite


def test_sqlite_is_set_up_for_many_processes(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/deep/er/study.db")
    with storage._backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
        # A transaction that has only read so far already keeps other writers out.
        other = sqlite3.connect(tmp_path / "deep/er/study.db", timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_an_existing_study_is_found_again(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="there", storage=open_storage(url))
    assert optuna.load_study(study_name="there", storage=open_storage(url)).study_name == "there"


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "study.db"
    path.write_text("the notes of somebody " * 100)
    with pytest.raises(ValueError) as error:
        open_storage(f"sqlite:///{path}")
    assert str(path) in one_line(error)
    assert "not a database" in one_line(error)
    assert path.read_text() == "the notes of somebody " * 100


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(ValueError, match="another program"):
        open_storage(f"sqlite:///{path}")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(OSError) as error:
        open_storage("sqlite:////proc/nowhere/study.db")
    assert "cannot create the folder /proc/nowhere" in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as error:
        open_storage(f"sqlite:///{tmp_path}/study.db")
    assert "read-only" in one_line(error)


def test_network_file_systems_are_refused_for_sqlite(tmp_path, monkeypatch):
    mount = namedtuple("mount", "mountpoint fstype")
    monkeypatch.setattr(
        psutil, "disk_partitions", lambda **_: [mount("/", "ext4"), mount(str(tmp_path.resolve()), "nfs4")]
    )
    assert network_file_system(tmp_path / "not" / "yet" / "there") == "nfs4"
    assert network_file_system(tmp_path.parent) is None
    with pytest.raises(ValueError) as error:
        open_storage(f"sqlite:///{tmp_path}/study.db")
    assert "nfs4" in one_line(error)
    assert "postgresql://" in one_line(error)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("study.db", "not a storage URL"),
        ("", "not a storage URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("journal:///x/journal.log", "journal"),
        ("/x/journal.log", "journal"),
        ("redis://host", "journal"),
        ("grpc://host", "grpc://HOST:PORT"),
        ("grpc://host:port", "grpc://HOST:PORT"),
        ("sqlite:////tmp", "is a folder"),
    ],
)
def test_urls_that_cannot_serve_are_refused(url, says):
    with pytest.raises(ValueError, match=says) as error:
        open_storage(url)
    one_line(error)


def test_an_unknown_database_is_named():
    with pytest.raises(ImportError, match="sqlite:///FOLDER"):
        open_storage("cassandra://host/db")


# ---------------------------------------------------------------------- trouble on the way


class Flaky:
    """Fails a number of times as SQLAlchemy does when the server has gone away."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            lost = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))
            raise optuna.exceptions.StorageInternalError("during the commit") from lost
        return "there"


def test_a_lost_connection_is_tried_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(storage_module.time, "sleep", pauses.append)
    assert retrying(Flaky(5)) == "there"
    assert len(pauses) == 5
    assert pauses[4] > pauses[0]


def test_patience_ends_with_a_clear_line():
    with pytest.raises(ConnectionError) as error:
        retrying(Flaky(1000), patience=0.3, what="the storage of study 'x'")
    assert "the storage of study 'x' has not answered" in one_line(error)
    assert "server closed the connection" in one_line(error)


def test_a_mistake_is_not_tried_again():
    calls = []

    def wrong():
        calls.append(1)
        raise KeyError("no such trial")

    with pytest.raises(KeyError):
        retrying(wrong)
    assert len(calls) == 1


def test_a_full_disk_is_one_clear_line_and_the_database_stays_whole(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    study = optuna.create_study(storage=storage)
    engine = storage._backend.engine
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    sqlalchemy.event.listen(engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={pages + 2}"))
    engine.dispose()
    with pytest.raises(OSError) as error:
        for number in range(50):
            retrying(lambda n=number: study.set_user_attr(f"key {n}", "x" * 1000), patience=5)
    assert "the disk is full" in one_line(error)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
