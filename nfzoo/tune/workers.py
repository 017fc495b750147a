"""Who runs the trials: this process, processes of its own, or keras-tuner's workers around a chief.

All do the same. A worker asks for a trial that is neither finished nor locked, claims it, trains it, and asks again;
what is finished or running is seen in the folders, so that nothing is lost with whoever is killed, chief or worker, and
the trial of a dead worker is free at once. keras-tuner's own bookkeeping would not do: after a worker is killed its
chief (1.4.8) neither gives the trial to another one nor ends, and it hands out the trials of a grid one by one.
"""

import builtins
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import keras
import keras_tuner
from keras_tuner import errors
from keras_tuner.engine.base_tuner import BaseTuner

from nfzoo.tune import trials
from nfzoo.tune.plan import OBJECTIVE, Plan
from nfzoo.tune.space import Setting, Spec, Trial

PAUSE = 0.5  # seconds between two questions where there is nothing to do
FORGOTTEN = 10  # seconds without a question after which a worker does not keep a chief that has nothing more to give


class Folders(keras_tuner.Oracle):
    """Gives out what a plan has left. Workers report nothing to it: their folders do."""

    def __init__(self, plan: Plan):
        self.plan, self.asked = plan, {}
        super().__init__(objective=OBJECTIVE)

    @property
    def tuner_ids(self) -> set[str]:
        """Workers that a chief must not leave before they know that all is done."""
        return {name for name, when in self.asked.items() if time.monotonic() - when < FORGOTTEN}

    @tuner_ids.setter
    def tuner_ids(self, _) -> None:  # keras-tuner's list never forgets a worker that was killed
        pass

    def create_trial(self, tuner_id: str):
        """A trial to run, or the word that there is none yet ("IDLE") or none any more ("STOPPED")."""
        self.asked[tuner_id] = time.monotonic()
        self.plan.update()
        space = keras_tuner.HyperParameters()
        for trial in self.plan.trials:
            if trial.name not in self.plan.results and not trials.busy(self.plan.out, trial.name):
                space.Fixed("trial", json.dumps(trial))
                return keras_tuner.engine.trial.Trial(space, trial_id=trial.name)
        if self.plan.finished:
            del self.asked[tuner_id]
        return keras_tuner.engine.trial.Trial(space, status="STOPPED" if self.plan.finished else "IDLE")

    def get_trial(self, trial_id: str):
        """Nothing is known of a trial but its name."""
        return keras_tuner.engine.trial.Trial(keras_tuner.HyperParameters(), trial_id=trial_id)

    def update_trial(self, trial_id: str, metrics, step: int = 0):
        """The folder has the metrics."""
        return self.get_trial(trial_id)

    def end_trial(self, trial) -> None:
        """The folder tells the end."""


class Tuner(BaseTuner):
    """keras-tuner's loop around `trials.run`; with its KERASTUNER_* variables it is a chief or asks one."""

    def __init__(self, plan: Plan):
        self.plan, self._idle = plan, False
        super().__init__(Folders(plan))

    @property
    def project_dir(self) -> str:
        """Nothing of the tuner's own is written there."""
        return str(self.plan.out)

    def save(self, *_) -> None:
        """The folders of the trials are all that is kept."""

    def pre_create_trial(self) -> None:
        """Wait where the last question had no answer."""
        if self._idle:
            time.sleep(PAUSE)
        self._idle = True

    def on_trial_begin(self, trial) -> None:
        """There was an answer."""
        self._idle = False

    def run_trial(self, trial, **_):
        """Train; an error stops the scan, where keras-tuner would print a trace and go on."""
        (model, values), seed = json.loads(trial.hyperparameters.get("trial"))
        try:
            trials.run(Trial(Setting(model, tuple(map(tuple, values))), seed), self.plan.spec, self.plan.out)
        except Exception as error:
            raise errors.FatalError(str(error)) from error
        return {OBJECTIVE.name: 0.0}


def work(plan: Plan) -> None:
    """Run trials until none is left.

    Raises:
        Exception: that of the first trial that could not run.
    """
    try:
        Tuner(plan).search(verbose=0)
    except errors.FatalError as error:
        raise error.__cause__ from None
    except Exception as error:
        if "Rpc" not in type(error).__name__:
            raise
        chief = f"{os.environ['KERASTUNER_ORACLE_IP']}:{os.environ['KERASTUNER_ORACLE_PORT']}"
        raise RuntimeError(
            f"Expected an answer of the chief at {chief}. Received: none; start it and this worker again, what is "
            "finished stays"
        ) from None


def role() -> str | None:
    """ "chief" or "worker" by keras-tuner's environment variables; None without them."""
    if "KERASTUNER_ORACLE_IP" not in os.environ:
        return None
    return "chief" if "chief" in os.environ.get("KERASTUNER_TUNER_ID", "") else "worker"


def serve(plan: Plan) -> None:
    """Be the chief until every trial is done and every worker that lives has heard so."""
    failed: list[Exception] = []

    def listen() -> None:
        try:
            work(plan)
        except Exception as error:
            failed.append(error)

    # keras-tuner's chief looks every 20 seconds whether it is over.
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    while thread.is_alive() and not plan.finished:
        thread.join(PAUSE)
        plan.update()
    thread.join(FORGOTTEN)
    if failed:
        raise failed[0]


def run_workers(plan: Plan, count: int) -> None:
    """Run trials in so many processes; whatever ends this one ends them.

    Raises:
        Exception: the error that stopped a worker.
        RuntimeError: if all workers were killed.
    """
    open_trials = sum(trial.name not in plan.results for trial in plan.trials)
    workers = [_start(plan, i) for i in range(min(count, open_trials) if plan.complete else count)]
    try:
        while not plan.finished:
            plan.update()
            codes = [worker.poll() for worker in workers]
            for worker, code in zip(workers, codes, strict=True):
                if code == 1:
                    raise _error(worker)
            if None not in codes and not plan.finished:
                plan.update()
                if not plan.finished:
                    _all_killed(plan, codes)
            time.sleep(PAUSE)
    finally:
        for worker in workers:
            worker.stdin.close()  # they end when this closes, see `main`
        for worker in workers:
            try:
                worker.wait(FORGOTTEN)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()


def _all_killed(plan: Plan, codes: list[int]) -> None:
    # A run that SIGTERM ends saves its state and exits with 128 + 15.
    numbers = {-code if code < 0 else code - 128 for code in codes if code < 0 or code > 128}
    known = {number.value: number.name for number in signal.Signals}
    names = ", ".join(known.get(number, f"status {number + 128}") for number in sorted(numbers))
    raise RuntimeError(
        f"Expected workers that live. Received: all were ended by {names or 'others'}; if memory ran out, take fewer "
        f"--workers or a smaller batch_size. The same command goes on, logs are in {plan.out / 'logs'}"
    )


def _start(plan: Plan, index: int) -> subprocess.Popen:
    # The worker finds modules where this process does, whatever made its path.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONPATH": path}
    if devices := _devices():
        environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
        # Workers that share a device take of its memory what they need.
        environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    (plan.out / "logs").mkdir(parents=True, exist_ok=True)
    with (plan.out / "logs" / f"worker{index}.log").open("a") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "nfzoo.tune"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    with contextlib.suppress(BrokenPipeError):  # it has ended; its status will tell
        worker.stdin.write(
            json.dumps({"out": str(plan.out.resolve()), "spec": plan.spec.model_dump(mode="json")}) + "\n"
        )
        worker.stdin.flush()
    return worker


def _devices() -> list[str]:
    """GPUs of this machine, of which each worker gets one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device]
    return [path.name.removeprefix("nvidia") for path in sorted(pathlib.Path("/dev").glob("nvidia[0-9]*"))]


def _error(worker: subprocess.Popen) -> Exception:
    """The error that a worker said last, as far as its class is Python's own."""
    try:
        kind, text = json.loads(worker.stdout.read().splitlines()[-1])
    except (IndexError, ValueError):
        return RuntimeError(f"Expected a worker that works. Received: exit status {worker.returncode}; see its log")
    return getattr(builtins, kind, RuntimeError)(text)


def _end_with_parent() -> None:
    sys.stdin.read()
    trials.withdraw()
    os._exit(3)


def main() -> int:
    """A worker process: what to do comes on the standard input, whose end is the end of whoever started it."""
    description = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    try:
        work(Plan(Spec.model_validate(description["spec"]), pathlib.Path(description["out"])))
    except Exception as error:
        os.write(report, (json.dumps([type(error).__name__, str(error)]) + "\n").encode())
        return 1
    return 0
