"""Scans in several processes: workers of their own, a chief and its workers, and whoever is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
from rich.console import Console

from nfzoo import recipes, tune
from nfzoo.tune import plan, workers

TINY = ("--data", "fake", "--set", "data.limit=32", "--set", "batch_size=16", "--epochs", "1", "--set", "agc=none")
GRID = ("none_test_ffnn", "--lr", "1e9,0.01,0.001", "--seeds", "0,1", "--set", "optimizer.name=sgd", *TINY)
FACTS = ["model", "learning_rate", "seed", "status", "val_accuracy", "epochs"]


class Command:
    """`nfzoo scan` in a process of its own, killed at the end of the test at the latest."""

    def __init__(self, out, *arguments, **environment):
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nfzoo.cli", "scan", *arguments, "--out", str(out)],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait_for(self, done: int) -> None:
        """Until so many trials are done."""
        until = time.monotonic() + 120
        while len(list(self.out.glob("*/metrics.json"))) < done:
            assert self.process.poll() is None and time.monotonic() < until, self.process.stdout.read()
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        text, _ = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, text
        return text

    def workers(self) -> list[int]:
        return [int(n) for n in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split()]  # fmt: skip


@pytest.fixture
def command():
    made = []

    def start(*arguments, **environment):
        made.append(Command(*arguments, **environment))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.stdout.close()
        one.process.wait()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The table of a scan that nobody killed."""
    out = tmp_path_factory.mktemp("whole")
    Command(out, *GRID).end()
    return pd.read_csv(out / "scan.csv")


def _same(out, expected) -> None:
    table = pd.read_csv(out / "scan.csv")
    pd.testing.assert_frame_equal(table[FACTS], expected[FACTS], check_exact=True)
    assert len(table) == 6 and set(table.status) == {"complete", "diverged"}


@pytest.fixture
def chief():
    """Variables of keras-tuner's protocol, for a chief on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def named(name):
        return {"KERASTUNER_TUNER_ID": name, "KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": port}

    return named


@pytest.mark.slow
def test_a_killed_worker_costs_its_trial_and_others_take_it_over(command, tmp_path, expected):
    scan = command(tmp_path, *GRID, "--workers", "2")
    scan.wait_for(1)
    os.kill(scan.workers()[0], signal.SIGKILL)
    assert "best by validation" in scan.end()
    _same(tmp_path, expected)


@pytest.mark.slow
def test_a_scan_killed_twice_gives_the_same_table_and_leaves_no_process(command, tmp_path, expected):
    finished = {}
    for done in (1, 3):
        scan = command(tmp_path, *GRID, "--workers", "2")
        scan.wait_for(done)
        orphans = scan.workers()
        scan.kill()
        until = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{orphan}") for orphan in orphans):
            assert time.monotonic() < until
            time.sleep(0.05)
        finished |= {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.json")}
    command(tmp_path, *GRID, "--workers", "2").end()
    _same(tmp_path, expected)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())  # done once


@pytest.mark.slow
def test_a_chief_and_workers_survive_a_kill_of_either(command, tmp_path, expected, chief):
    first = command(tmp_path, *GRID, **chief("chief"))
    worker = command(tmp_path, *GRID, **chief("worker0"))
    worker.wait_for(1)
    worker.kill()
    again = command(tmp_path, *GRID, **chief("worker0"))
    again.wait_for(2)
    first.kill()
    # The worker waits for a chief, or has been told that it is gone.
    second = command(tmp_path, *GRID, **chief("chief"))
    if again.process.poll() is not None:
        assert "start it and this worker again" in again.process.stdout.read()
    another = command(tmp_path, *GRID, **chief("worker1"))
    assert "6/6" in second.end() and "best by validation" in another.end()
    _same(tmp_path, expected)


@pytest.mark.slow
def test_all_workers_killed_is_said_and_an_error_is_said_once(command, tmp_path):
    scan = command(tmp_path / "killed", *GRID, "--workers", "2")
    scan.wait_for(1)
    for worker in scan.workers():
        os.kill(worker, signal.SIGKILL)
    text, _ = scan.process.communicate(timeout=60)
    assert scan.process.returncode == 1 and "SIGKILL" in text and "same command goes on" in text
    wrong = command(tmp_path / "wrong", *GRID, "--workers", "2", "--data", "no_such_set")
    text, _ = wrong.process.communicate(timeout=120)
    assert wrong.process.returncode == 1 and "no_such_set" in text
    assert text.startswith("error: ") and len(text.splitlines()) == 1


def test_a_finished_scan_starts_no_workers(tmp_path, monkeypatch):
    recipe = recipes.get("demo")
    name = tune.trial_name("sn_test_ffnn", {"optimizer.learning_rate": 0.1}, 0)
    (tmp_path / name).mkdir()
    metrics = {"status": "complete", "val_accuracy": 0.5, "epochs": 1, "seconds": 1.0}
    (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(workers, "_start", None)
    results = tune.scan(["sn_test_ffnn"], [0.1], recipe, tmp_path, seeds=[0], workers=3, console=Console(quiet=True))
    assert results.val_accuracy.tolist() == [0.5]


def test_a_chief_leaves_workers_that_are_gone_and_waits_for_those_that_are_there(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    spec = tune.spec(["sn_test_ffnn"], {"optimizer.learning_rate": [0.1]}, recipes.get("demo"), seeds=[0])
    oracle = workers.Folders(plan.Plan(spec, tmp_path))
    assert oracle.create_trial("dead").status == oracle.create_trial("alive").status == "RUNNING"
    now[0] += 11
    with workers.trials.claim(tmp_path, "sn_test_ffnn-lr0.1-seed0"):
        assert oracle.create_trial("alive").status == "IDLE"
    assert oracle.tuner_ids == {"alive"}
    (tmp_path / "sn_test_ffnn-lr0.1-seed0").mkdir()
    (tmp_path / "sn_test_ffnn-lr0.1-seed0" / "metrics.json").write_text('{"status": "diverged"}')
    assert oracle.create_trial("alive").status == "STOPPED" and oracle.tuner_ids == set()


def test_workers_and_a_chief_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    assert workers.role() == "worker"
    with pytest.raises(ValueError, match="one worker per process"):
        tune.scan(["sn_test_ffnn"], [0.1], recipes.get("demo"), tmp_path / "scan", workers=2)
    assert not (tmp_path / "scan").exists()


def test_each_worker_gets_a_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert workers._devices() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers._devices() == []


def test_how_workers_ended_is_said_whatever_their_status(tmp_path):
    class Plan:
        out = tmp_path

    with pytest.raises(RuntimeError, match="SIGKILL, status 255;"):
        workers._all_killed(Plan, [-9, 255])
