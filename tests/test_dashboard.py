"""A study in optuna-dashboard: its note and figures, and a server that says what is wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.request

import optuna
import pytest
from optuna_dashboard import get_note
from stand_in_studies import baselines_of, front_of, report_on_other_rows, stand_in_study

from lat_optuna import dashboard, summary
from lat_optuna.search.front import Front
from lat_optuna.search.storage import open_storage

BASELINES = baselines_of()


def figures_of(study: optuna.Study) -> dict[str, dict]:
    attrs = study._storage.get_study_system_attrs(study._study_id)
    pieces: dict[str, dict[int, str]] = {}
    for key, value in attrs.items():
        if found := re.fullmatch(r"dashboard:plot_data:(.*):(\d+)", key):
            pieces.setdefault(found[1], {})[int(found[2])] = value
    return {name: json.loads("".join(parts[i] for i in sorted(parts))) for name, parts in pieces.items()}


def test_the_note_says_what_was_run_and_what_came_out():
    study = stand_in_study(60)
    front = front_of(study)
    dashboard.annotate(study, BASELINES, front=front, n_trials=80)
    note = get_note(study)
    assert "**MiniLM \\<small> on SST-2 & friends, 872 rows**" in note
    assert "- Search: stopped, 60 of 80 trials" in note
    assert "- seeds: training 42, search 0" in note
    lossless = summary.without_loss(front, BASELINES)
    (line,) = (line for line in note.splitlines() if line.startswith("| cheapest point without loss"))
    assert f"| {lossless.metric:.2f} ± 1.14 | {lossless.cost:.3f}× |" in line
    assert line.endswith(f"| {lossless.number} | {lossless.text} |")


def test_the_note_tells_both_splits_apart():
    study = stand_in_study(60)
    report_on_other_rows(study)
    front, baselines = front_of(study), baselines_of(apart=True)
    dashboard.annotate(study, baselines, front=front)
    note = get_note(study)
    assert "- Rows: search: accuracy on the search split, 2,000 examples, where points were chosen; validation:" in note
    assert "| | accuracy (%), search | accuracy (%), validation | FLOPs | change |" in note.replace("|  |", "| |")
    lossless = summary.without_loss(front, baselines)
    (line,) = (line for line in note.splitlines() if line.startswith("| cheapest point without loss"))
    assert f"| {lossless.metric:.2f} ± 0.75 | {lossless.reported:.2f} ± 1.19 | {lossless.cost:.3f}× |" in line
    assert set(figures_of(study)) == {"front", "reported", "area-under-the-front", "lengths"}
    (points,) = (t for t in figures_of(study)["reported"]["data"] if t["name"].startswith("points of the front"))
    assert points["y"] == [point.reported for point in front.points]


def test_annotating_again_replaces_what_was_there():
    study = stand_in_study(60)
    dashboard.annotate(study, BASELINES, front=front_of(study))
    before = get_note(study)
    study.add_trials(stand_in_study(90).trials[60:])
    dashboard.annotate(study, BASELINES, front=front_of(study))
    assert "60 trials" in before
    assert "90 trials" in get_note(study)
    assert "60 trials" not in get_note(study)
    assert set(figures_of(study)) == {"front", "area-under-the-front", "lengths"}
    assert figures_of(study)["area-under-the-front"]["data"][0]["customdata"][-1][0] == 90


def test_figures_of_a_long_front_stay_small():
    study = stand_in_study(800)
    front = front_of(study)
    assert len(front) > dashboard.MOST_POINTS
    dashboard.annotate(study, BASELINES, front=front)
    (line,) = (trace for trace in figures_of(study)["front"]["data"] if trace["name"] == "Pareto front")
    assert len(line["x"]) == dashboard.MOST_POINTS
    assert (line["y"][0], line["y"][-1]) == (front.points[0].metric, front.points[-1].metric)
    assert all(len(json.dumps(figure)) < 16_000 for figure in figures_of(study).values())


def test_an_empty_study_can_be_annotated():
    study = optuna.create_study(directions=["maximize", "minimize"])
    dashboard.annotate(study)
    assert "No configuration has been evaluated yet." in get_note(study)
    assert set(figures_of(study)) == {"front"}


def test_a_measured_latency_has_a_figure():
    study = stand_in_study(20, directions=("maximize", "minimize", "minimize"))
    dashboard.annotate(study)
    assert "latency" in figures_of(study)
    assert "latency\\_ms" in get_note(study)


# ---------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """A finished study in a database, with note and figures."""
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'study.db'}"
    study = stand_in_study(60, storage=open_storage(url))
    dashboard.annotate(study, BASELINES, front=front_of(study), n_trials=60)
    return url


@pytest.fixture
def served(url):
    (server,) = dashboard.make_servers([url, url], port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, path: str) -> dict:
    base = dashboard.address(server).removesuffix("/dashboard")
    with urllib.request.urlopen(base + path) as answer:
        return json.load(answer)


def test_the_server_answers_with_the_study(served):
    assert served.studies == "stand-in"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dashboard", dashboard.address(served))
    (summary,) = ask(served, "/api/studies")["study_summaries"]
    assert summary["study_name"] == "stand-in"
    detail = ask(served, f"/api/studies/{summary['study_id']}")
    assert detail["objective_names"] == ["accuracy", "flops_ratio"]
    assert len(detail["trials"]) == 60
    assert len(detail["plotly_graph_objects"]) == 3


def test_a_poll_neither_waits_for_a_writing_worker_nor_stops_it(served, url):
    storage = open_storage(url)
    with storage._backend.engine.begin() as writing:
        writing.exec_driver_sql("UPDATE studies SET study_name = study_name")
        assert len(ask(served, "/api/studies/1")["trials"]) == 60
    study = optuna.load_study(study_name="stand-in", storage=storage)
    before = ask(served, "/api/studies/1")["note"]
    dashboard.annotate(study, BASELINES, front=Front.of(study))
    assert ask(served, "/api/studies/1")["note"]["version"] > before["version"]


def test_serve_tells_every_address(url, tmp_path, monkeypatch):
    other = f"sqlite:///{tmp_path / 'other.db'}"
    stand_in_study(2, name="other", storage=open_storage(other))
    served, told = [], []

    def make(*arguments):
        served.extend(servers(*arguments[:2], 0))
        return served

    servers = dashboard.make_servers
    monkeypatch.setattr(dashboard, "make_servers", make)
    thread = threading.Thread(target=dashboard.serve, args=([url, other],), kwargs={"announce": told.append})
    thread.start()
    while len(told) < 3:
        thread.join(0.05)
        assert thread.is_alive()
    assert told[0].endswith("/dashboard (stand-in)")
    assert told[1].endswith("/dashboard (other)")
    for server in served:
        server.shutdown()
    thread.join()
    with pytest.raises(OSError):
        ask(served[0], "/api/studies")


def test_a_taken_port_is_named_and_nothing_stays_open(url):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} of 127\.0\.0\.1 is taken; choose another with --port"):
            dashboard.make_servers([url], port=port)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: f"sqlite:///{folder / 'none.db'}", FileNotFoundError, r"none\.db: no such database"),
        (lambda folder: f"sqlite:///{folder / 'text.db'}", ValueError, r"text\.db cannot serve as a study's storage"),
        (lambda folder: "study.db", ValueError, r"not a storage URL"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path, make, error, message):
    (tmp_path / "text.db").write_text("this is no database" * 100)
    with pytest.raises(error, match=message):
        dashboard.make_servers([make(tmp_path)], port=0)
    assert not (tmp_path / "none.db").exists()


def test_an_unknown_host_is_refused(url):
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:0"):
        dashboard.make_servers([url], host="192.0.2.1", port=0)
