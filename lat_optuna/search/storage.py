"""Where trials live: from a storage URL to an Optuna storage that stands many workers at once."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sqlite3
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import optuna
import psutil
import sqlalchemy
from optuna.storages import BaseStorage

from lat_optuna.search.rdb import LeanStorage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Result = TypeVar("Result")

BUSY_TIMEOUT = 60.0
"""Seconds that a SQLite connection waits for another one's write."""
PATIENCE = 300.0
"""Seconds for which a lost connection is tried again."""
PROXY_THREADS = 10
PROXY_SECONDS = 10.0
"""For how long a gRPC proxy is given to answer at first."""
TURN_SECONDS = 5.0
"""For how long one waits for one's turn before doing without."""
FORMS = "sqlite:///FOLDER/study.db, postgresql://USER:PASSWORD@HOST/DATABASE or grpc://HOST:PORT"
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "fuse.sshfs")


def redact(text: str) -> str:
    """The text with every password of a URL replaced by ``***``."""
    text = re.sub(r"(\w[\w+.-]*://[^\s:@/]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)\b(password|passwd|pwd)=[^&\s'\"]*", r"\1=***", text)


def open_storage(url: str, connections: int = 3) -> BaseStorage:
    """An Optuna storage for a URL, set up for many processes at once.

    SQLite gets WAL, ``synchronous=NORMAL``, a busy time-out of a minute, and ``BEGIN IMMEDIATE``: a transaction that
    reads first and writes afterwards would otherwise fail or write what is out of date.

    Args:
        url: ``sqlite:///...`` (the folder is created), ``postgresql://...`` or ``grpc://host:port``. Other databases
            that SQLAlchemy knows may work and are not promised.
        connections: To a database server, at most and beside two more. A worker talks from two threads, its loop and
            its sign of life, and holds its turn on a third connection.

    Raises:
        ValueError: The URL is malformed or names something that cannot serve as a study's storage.
        OSError: The folder cannot be created or written, or the server is not there (``ConnectionError``).
        ImportError: The database's driver is not installed.
    """
    scheme = url.partition("://")[0].partition("+")[0].lower() if "://" in url else ""
    if scheme == "grpc":
        return _open_grpc(url)
    if scheme.startswith(("journal", "redis", "file")) or (not scheme and url.endswith((".log", ".journal"))):
        raise ValueError(
            f"{redact(url)}: a journal starves all workers but one and is not supported as a study's storage; "
            f"use {FORMS}"
        )
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise ValueError(f"{redact(url)!r} is not a storage URL; write {FORMS}") from None
    if scheme == "sqlite":
        return _open_sqlite(parsed)
    return _open_server(parsed, scheme, connections)


def serve(url: str, host: str = "localhost", port: int = 13000) -> None:
    """Run Optuna's gRPC proxy in front of a database until it is interrupted.

    Args:
        url: The database: PostgreSQL, or a SQLite file of this machine.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        ValueError: The URL names another proxy, or cannot serve; see :func:`open_storage`.
        OSError: The database does not answer, or the address cannot be listened on.
    """
    if url.startswith("grpc://"):
        raise ValueError("a gRPC proxy serves a database, not another proxy; give it postgresql://...")
    _need("grpc", "grpcio protobuf", "a gRPC proxy")
    backend = open_storage(url, connections=PROXY_THREADS)
    with ThreadPoolExecutor(PROXY_THREADS) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            optuna.storages.run_grpc_proxy_server(backend, host=host, port=port, thread_pool=threads)
        except RuntimeError as error:  # what grpc says of a port that it cannot listen on
            raise OSError(f"cannot listen on {host}:{port}: {' '.join(str(error).split())}") from None


def retrying(call: Callable[[], Result], patience: float = PATIENCE, what: str = "the storage") -> Result:
    """Call, and call again with growing pauses while the connection to the storage is lost.

    Args:
        call: Reads, or writes something that may be written twice.
        patience: Seconds after which the error is final.
        what: Names the storage in errors; without passwords.

    Raises:
        ConnectionError: The connection did not come back.
        OSError: The disk is full, or the database cannot be read or written.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except Exception as error:
            reason = " ".join(redact(_reason(error)).split())
            fatal = _fatal(reason)
            if fatal:
                raise OSError(f"{what}: {fatal} ({reason})") from error
            if not _is_lost_connection(error):
                raise
            waited = time.monotonic() - start
            if waited + pause > patience:
                raise ConnectionError(f"{what} has not answered for {waited:.0f} s: {reason}") from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, 10.0)


# ---------------------------------------------------------------------- one after the other


@contextmanager
def turn(storage: BaseStorage, study_id: int, seconds: float = TURN_SECONDS) -> Iterator[bool]:
    """Take turns with the other processes that work on a study.

    A courtesy: whoever looks at the trials and then adds one would often come second without it, but nothing may depend
    on it. It is released when its holder dies, it is not waited for longer than ``seconds``, and Optuna's gRPC proxy
    has nothing to offer for it.

    Args:
        storage: As :func:`open_storage` gives it.
        study_id: Optuna's id of the study.
        seconds: How long to wait.

    Yields:
        Whether it is this process's turn.
    """
    engine = getattr(getattr(storage, "_backend", None), "engine", None)
    with ExitStack() as stack:
        if isinstance(storage, optuna.storages.InMemoryStorage):
            yield True
        elif engine is None:
            yield False
        elif engine.dialect.name == "sqlite":
            yield _lock_file(Path(f"{engine.url.database}-turn"), seconds, stack)
        elif engine.dialect.name == "postgresql":
            yield _lock_advisory(engine, study_id, seconds, stack)
        else:
            yield False


def _lock_file(path: Path, seconds: float, stack: ExitStack) -> bool:
    """Lock a file beside the database: not the database itself, whose own locks closing it would break."""
    if fcntl is None:
        return False
    try:
        file = stack.enter_context(path.open("a"))
    except OSError:
        return False  # a full or read-only disk is the storage's to report
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(random.uniform(0.001, 0.005))


def _lock_advisory(engine: sqlalchemy.Engine, study_id: int, seconds: float, stack: ExitStack) -> bool:
    """PostgreSQL's advisory lock, for the length of a transaction on a connection of its own."""
    try:
        connection = engine.connect()
        stack.callback(_close, connection)
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * seconds)}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({zlib.crc32(b'lat_optuna') >> 1}, {study_id})")
    except sqlalchemy.exc.SQLAlchemyError:
        return False  # not in time, or without connection, which is the storage's to report
    return True


def _close(connection: sqlalchemy.Connection) -> None:
    with suppress(sqlalchemy.exc.SQLAlchemyError):  # it was lost meanwhile, and the lock with it
        connection.close()


_thread = threading.local()


@contextmanager
def reading() -> Iterator[None]:
    """Mark transactions of this thread as reading only: on SQLite they wait for nobody, and nobody for them."""
    _thread.reading = True
    try:
        yield
    finally:
        _thread.reading = False


# ---------------------------------------------------------------------- kinds of storage


def _open_sqlite(url: sqlalchemy.URL) -> BaseStorage:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ValueError(f"{url}: trials in memory are lost with the process; write sqlite:///FOLDER/study.db")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path}: cannot create the folder {path.parent}: {error.strerror or error}") from None
    file_system = network_file_system(path)
    if file_system:
        raise ValueError(
            f"{path} lies on a network file system ({file_system}), where SQLite loses writes; put it on a local "
            "disk (--set storage=sqlite:////LOCAL/FOLDER/study.db), or use postgresql:// for several machines"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a SQLite storage is a file: sqlite:///{path}/study.db")
    for place in (path.parent, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(f"{place} is read-only; a study needs to write to it")
    try:
        _prepare_sqlite(path)
    except sqlite3.DatabaseError as error:
        locked = "locked" in str(error)
        advice = "another program holds it" if locked else "choose another file with storage=sqlite:///..."
        raise (OSError if locked else ValueError)(
            f"{path} cannot serve as a study's storage: {error}; {advice}"
        ) from None
    storage = _create(str(url), {"connect_args": {"timeout": BUSY_TIMEOUT}})
    # Only now: Optuna's check of the schema opens a second transaction inside the first and would lock itself out.
    sqlalchemy.event.listen(storage.engine, "connect", _on_sqlite_connect)
    sqlalchemy.event.listen(storage.engine, "begin", _on_sqlite_begin)
    storage.engine.dispose()
    return optuna.storages.get_storage(storage)


def _create(url: str, arguments: dict[str, Any]) -> optuna.storages.RDBStorage:
    """Connect; workers that find an empty database at the same time get in one another's way creating the tables."""
    for _ in range(20):
        try:
            return LeanStorage(url, engine_kwargs=arguments)
        except (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
            reason = _reason(error)
            if not any(sign in reason for sign in ("already exists", "duplicate key", "UNIQUE", "locked")):
                raise
            time.sleep(random.uniform(0.05, 0.5))
    return LeanStorage(url, engine_kwargs=arguments)


def _prepare_sqlite(path: Path) -> None:
    """Set WAL, which lasts, and make sure that the file is Optuna's or empty."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "trials" not in tables and "studies" not in tables:
            shown = ", ".join(sorted(tables)[:3])
            raise sqlite3.DatabaseError(f"it is the database of another program (tables {shown})")
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def _on_sqlite_connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come before ours
    connection.execute("PRAGMA synchronous=NORMAL")


def _on_sqlite_begin(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN" if getattr(_thread, "reading", False) else "BEGIN IMMEDIATE")


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that a path lies on, or ``None``."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    place = place.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype.lower() for mount in psutil.disk_partitions(all=True)}
    for parent in (place, *place.parents):
        if parent in mounts:
            kind = mounts[parent]
            return kind if kind.startswith(NETWORK_FILE_SYSTEMS) else None
    return None


def _open_server(url: sqlalchemy.URL, scheme: str, connections: int) -> BaseStorage:
    shown = url.render_as_string(hide_password=True)
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if scheme in ("postgresql", "postgres"):
        if "+" not in url.drivername:
            driver = "psycopg2" if importlib.util.find_spec("psycopg2") else "psycopg"
            _need(driver, "'lat-optuna[postgres]'", shown)
            url = url.set(drivername=f"postgresql+{driver}")
        arguments |= {"pool_size": connections, "max_overflow": 2, "connect_args": {"connect_timeout": 10}}
    try:
        storage = _create(url.render_as_string(hide_password=False), arguments)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise ImportError(f"{shown}: {error}; install the database's driver, or use {FORMS}") from None
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
        reason = " ".join(redact(str(error.orig)).split())
        raise ConnectionError(f"{shown} does not answer: {reason}") from None
    return optuna.storages.get_storage(storage)


def _open_grpc(url: str) -> BaseStorage:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise ValueError(f"{redact(url)!r} is not a storage URL; write grpc://HOST:PORT")
    _need("grpc", "grpcio protobuf", url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=parts.hostname, port=port)
    try:
        storage.wait_server_ready(timeout=PROXY_SECONDS)
    except ConnectionError:
        raise ConnectionError(f"{url} does not answer; is `lat-optuna storage serve` running there?") from None
    return storage


def _need(module: str, package: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what} needs the package {module}: pip install {package}")


# ---------------------------------------------------------------------- errors


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """What the database's driver said, under Optuna's and SQLAlchemy's wrapping."""
    for link in _chain(error):
        if isinstance(link, sqlalchemy.exc.DBAPIError):
            return str(link.orig)
        if callable(getattr(link, "details", None)):  # grpc.RpcError
            return str(link.details())  # type: ignore[attr-defined]
    return str(error) or type(error).__name__


def _fatal(reason: str) -> str | None:
    """What to do about an error of the database that waiting does not mend, or ``None``."""
    known = {
        "disk is full": "the disk is full; free some space and start again, nothing is lost",
        "No space left": "the server's disk is full; free some space and start again, nothing is lost",
        "readonly database": "the database is read-only",
        "unable to open database file": "the database file is gone or its folder cannot be written",
        "disk I/O error": "the disk fails",
        "malformed": "the database is damaged",
        "not a database": "the file is no database any more",
        "no such table": "the database was emptied",
    }
    return next((advice for sign, advice in known.items() if sign in reason), None)


def _is_lost_connection(error: BaseException) -> bool:
    for link in _chain(error):
        # TimeoutError is the pool's: all connections hang.
        if isinstance(
            link, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError | sqlalchemy.exc.TimeoutError
        ):
            return True
        if isinstance(link, sqlalchemy.exc.DBAPIError) and link.connection_invalidated:
            return True
        code = getattr(link, "code", None)
        if callable(code) and getattr(code(), "name", "") in (
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
            "UNKNOWN",
            "INTERNAL",
        ):
            return True
    return False
