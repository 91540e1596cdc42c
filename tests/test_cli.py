"""The command as people use it: a study trained, searched, stopped, gone on with, reported; and used wrongly."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import in_process
from tests.tiny_text import sentences, tiny_checkpoint, write_parquet

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lat_optuna", *map(str, arguments)]


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=cwd, timeout=300
    )


def make_study(folder: Path, name: str = "tiny", **training) -> Path:
    """A study file with everything that it needs beside it."""
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    write_parquet(folder / "data" / "train.parquet", sentences(96))
    write_parquet(folder / "data" / "validation.parquet", sentences(40, seed=1))
    content = {
        "name": name,
        "model": {"checkpoint": checkpoint},
        "task": {"type": "text_classification", "data": str(folder / "data"), "max_length": 16},
        "training": {"batch_size": 8, "epochs": 1, "adaptive_epochs": 1, "p": 0.4, "save_steps": 2, **training},
        "search": {"n_trials": 12, "num_initial": 4, "num_mutations": 4, "num_crossovers": 4},
        "output": str(folder / "out"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def trials(folder: Path) -> list[tuple]:
    """(slot, configuration, values) of the finished trials."""
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'out' / 'study.db'}")
    done = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    return sorted((t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in done)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that went all the way, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    study = make_study(folder)
    done = run("quickstart", study, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, study, done


def test_quickstart_goes_all_the_way(finished):
    folder, _, done = finished
    assert len(trials(folder)) == 12
    assert "FLOPs" in done.stdout
    assert str(folder / "out" / "report.html") in done.stdout
    assert "search.n_trials=24" in done.stdout
    assert "12 of 12 trials" in done.stderr
    assert re.search(r"standard fine-tuning: 12/12 steps.* accuracy [\d.]+$", done.stderr, re.MULTILINE)
    assert re.search(r"length-adaptive training: 12/12 steps.* accuracy [\d.]+  smallest [\d.]+$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    page = (folder / "out" / "report.html").read_text()
    assert "tiny" in page


def test_what_is_deployed_is_an_ordinary_checkpoint_with_the_front_beside_it(finished):
    from transformers import AutoModelForSequenceClassification

    from lat_optuna import load

    folder, _, _ = finished
    path = folder / "out" / "length_adaptive"
    assert not [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    dense = AutoModelForSequenceClassification.from_pretrained(path)
    assert type(dense).__name__ == "BertForSequenceClassification"
    model = load(path, budget=0.9)
    assert model.length_config is not None
    side = json.loads((path / "length_adaptive.json").read_text())
    assert side["training"]["p"] == 0.4
    assert [point["cost"] for point in side["front"]] == sorted(point["cost"] for point in side["front"])


def test_a_second_run_evaluates_nothing(finished):
    folder, study, _ = finished
    before = trials(folder)
    again = run("quickstart", study, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stderr
    assert "nothing left to do" in again.stderr
    assert trials(folder) == before


def test_two_runs_with_one_seed_agree_and_a_longer_one_goes_on(finished, tmp_path):
    folder, _, _ = finished
    study = make_study(tmp_path, eval_steps=5)
    done = run("train", study)
    assert done.returncode == 0, done.stderr
    weights = [path / "out" / "length_adaptive" / "model.safetensors" for path in (folder, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # looking at the metric on the way changes nothing
    for stage, names in (("standard", {"accuracy"}), ("length_adaptive", {"accuracy", "smallest"})):
        log = json.loads((tmp_path / "out" / stage / "losses.json").read_text())
        measured = [entry for entry in log if "accuracy" in entry]
        assert [entry["step"] for entry in measured] == [5, 10, 12]
        assert all(entry.keys() == names | {"epoch", "step"} for entry in measured)
    first = run("search", study, "--set", "search.n_trials=7")
    assert first.returncode == 0, first.stderr
    assert len(trials(tmp_path)) == 7
    second = run("search", study)
    assert second.returncode == 0, second.stderr
    assert trials(tmp_path) == trials(folder)


def test_front_picks_points(finished):
    _, study, _ = finished
    everything = json.loads(run("front", study, "--json").stdout)
    costs = [point["flops_ratio"] for point in everything["points"]]
    picked = json.loads(run("front", study, "--json", "--budget", "0.8").stdout)["points"]
    assert [point["flops_ratio"] for point in picked] == [max(cost for cost in costs if cost <= 0.8)]
    assert run("front", study, "--csv").stdout.splitlines()[0].startswith("trial,accuracy,flops_ratio")
    low = run("front", study, "--budget", "0.01")
    assert low.returncode == 1
    assert f"the smallest costs {min(costs):.4f}" in low.stderr


def test_a_report_goes_where_it_is_told_and_what_it_says_works_as_printed(finished, tmp_path):
    folder, study, _ = finished
    spaced = tmp_path / "my study.yaml"
    spaced.write_text(study.read_text().replace(str(folder / "out"), "elsewhere"))
    settings = ["--set", f"output={folder / 'out'}"]
    done = run("report", spaced, *settings, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert len(page) > 1_000_000  # plotly is inside
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    budget = str(data["points"][len(data["points"]) // 2]["cost"] + 1e-6)
    words = shlex.split(data["command"].replace("{budget}", budget))
    assert words[:3] == ["lat-optuna", "front", str(spaced)]
    (point,) = json.loads(run(*words[1:], "--json").stdout)["points"]
    names: dict = {}
    exec(data["python"].replace("{budget}", budget), names)
    assert str(names["model"].length_config) == point["configuration"]
    assert names["outputs"].logits.shape == (1, 2)


def test_a_changed_study_file_does_not_pass_for_the_trained_model(finished):
    _, study, _ = finished
    done = run("train", study, "--set", "training.learning_rate=1e-3")
    assert done.returncode == 2
    assert "training.learning_rate was 5e-05, now 0.001" in done.stderr
    # The standard stage knows nothing of p: only the second one is concerned.
    done = run("train", study, "--set", "training.p=0.3")
    assert done.returncode == 2
    assert "training.p was 0.4, now 0.3" in done.stderr


def test_a_database_of_another_checkpoint_is_refused(finished, tmp_path):
    folder, _, _ = finished
    study = make_study(tmp_path, seed=7)
    assert run("train", study).returncode == 0
    done = run("search", study, "--set", f"storage=sqlite:///{folder / 'out' / 'study.db'}")
    assert done.returncode == 1
    assert "weights is" in done.stderr
    assert len(trials(folder)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{study}", "--workers", "0"], "0 is not in the range x>=1"),
        (["search", "{study}", "--devices", "warp:1"], "'warp:1' is not a device"),
        (["search", "{study}", "--devices", "cuda:99"], "there is no cuda:99 here"),
        (["search", "{study}", "--devices", "cpu", "--workers", "2"], "2 workers for 1 devices"),
        (["train", "{study}", "--set", "training.epoch=1"], "did you mean epochs?"),
        (["train", "no-such.yaml"], "no such study file"),
        (["front", "{study}", "--budgets", "1"], "No such option"),
        (["front", "{study}", "--no-loss", "--max-drop", "1"], "contradict each other"),
        (["train", "{study}", "--set", "model.checkpoint=./nowhere", "--set", "output={new}"], "no folder ./nowhere"),
        (["search", "{study}", "--set", "output={new}"], "train first"),
        (["serve"], "No such command"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(finished, tmp_path, arguments, message):
    _, study, _ = finished
    filled = [argument.format(study=study, new=tmp_path / "new") for argument in arguments]
    done = in_process.run(*filled)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.data={folder}/elsewhere", "elsewhere"),
        ("task.label_column=answer", "answer"),
        ("storage=sqlite:///{folder}/text.db", "text.db"),
        ("storage=mysql://somewhere/db", "mysql"),
        ("output=/proc/lat", "/proc/lat"),
    ],
)
def test_what_cannot_be_had_is_named(finished, tmp_path, setting, message):
    _, study, _ = finished
    (tmp_path / "text.db").write_text("this is not a database, but it is long enough to be looked at" * 100)
    verb = "search" if setting.startswith("storage") else "train"
    output = [] if verb == "search" or setting.startswith("output") else ["--set", f"output={tmp_path / 'new'}"]
    done = in_process.run(verb, study, *output, "--set", setting.format(folder=tmp_path))
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_unsupported_architecture_is_named_with_those_that_are_supported(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from tests.tiny_text import tiny_tokenizer

    study = make_study(tmp_path)
    folder = tmp_path / "gpt"
    config = GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    done = in_process.run("train", study, "--set", f"model.checkpoint={folder}")
    assert done.returncode == 1
    assert "gpt2" in done.stderr
    assert "distilbert" in done.stderr


def wait_for(process: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_training_and_in_search_it_goes_on(finished, tmp_path, how):
    """The unbroken run's weights, and so its trials."""
    folder, _, _ = finished
    study = make_study(tmp_path, eval_steps=1)
    out = tmp_path / "out"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command("quickstart", study), env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def finished_trials() -> int:
        if not (out / "study.db").exists():
            return 0
        try:
            with sqlite3.connect(out / "study.db", timeout=10) as db:
                return db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    process = start()
    wait_for(process, lambda: any((out / "checkpoints" / "length_adaptive").glob("checkpoint-*/trainer_state.json")))
    process.send_signal(how)
    _, errors = process.communicate(timeout=200)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from here" in errors
    process = start()
    wait_for(process, lambda: finished_trials() >= 5)
    process.send_signal(how)
    process.communicate(timeout=200)
    done = run("quickstart", study)
    assert done.returncode == 0, done.stderr
    assert trials(tmp_path) == trials(folder)


def test_several_workers_share_the_trials(tmp_path):
    study = make_study(tmp_path)
    assert run("train", study).returncode == 0
    done = run("search", study, "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    found = trials(tmp_path)
    assert [slot for slot, _, _ in found] == list(range(12))
    assert len({config for _, config, _ in found}) == 12
    assert (tmp_path / "out" / "logs" / "worker-2.log").exists()


def test_torchrun_trains_on_all_its_processes_and_searches_with_them(tmp_path):
    study = make_study(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher += ["-m", "lat_optuna"]
    options = {"capture_output": True, "text": True, "check": False, "env": ENVIRONMENT, "timeout": 300}
    done = subprocess.run([*launcher, "train", str(study)], **options)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "out" / "length_adaptive" / "losses.json").read_text())
    assert losses[-1]["step"] == 6  # 96 rows in batches of 8 on each of two processes
    done = subprocess.run([*launcher, "worker", str(study)], **options)
    assert done.returncode == 0, done.stderr
    assert [slot for slot, _, _ in trials(tmp_path)] == list(range(12))


def test_a_front_before_any_search_says_what_to_do(tmp_path):
    study = make_study(tmp_path)
    done = run("front", study)
    assert done.returncode == 1
    assert "study.db" in done.stderr
