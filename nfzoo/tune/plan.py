"""Which trials a scan has: keras-tuner's oracles propose settings, the folders of finished trials answer them.

A plan holds no state of its own. What it proposes is a function of the scan's description and of the results so far,
taken in the order in which they were proposed, so that every process that reads the folders, at any time and after any
kill, comes to the same trials.
"""

import json
import pathlib
import threading
import warnings
from collections.abc import Callable

import keras_tuner

from nfzoo.tune.space import EPOCHS, Range, Setting, Spec, Trial, rounded

OBJECTIVE = keras_tuner.Objective("val_accuracy", "max")
ORACLES = {
    "grid": keras_tuner.oracles.GridSearchOracle,
    "random": keras_tuner.oracles.RandomSearchOracle,
    "bayesian": keras_tuner.oracles.BayesianOptimizationOracle,
    "hyperband": keras_tuner.oracles.HyperbandOracle,
}
LISTS = ("grid", "random")  # their settings do not depend on results


def score(metrics: dict) -> float:
    """What a search compares trials by: validation accuracy; one that diverged or ran out of memory has none."""
    return (metrics.get("val_accuracy") or 0.0) if metrics["status"] == "complete" else 0.0


def result(folder: pathlib.Path) -> dict | None:
    """What a trial's folder says of its end; None as long as it does not, or not legibly."""
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not there; no JSON, or no text
        return None


class Search:
    """The settings of one model, as one of keras-tuner's oracles proposes them.

    A setting is proposed when all results but those of the last `parallel - 1` settings are known, whatever came in
    besides. The oracle is told results in the order of its proposals.
    """

    def __init__(self, spec: Spec, model: str):
        self.spec, self.model = spec, model
        self.settings: list[Setting] = []
        self.over = False
        self._told = 0
        self._trials: list = []
        space = keras_tuner.HyperParameters()
        for path, axis in spec.axes.items():
            if isinstance(axis, Range):
                space.Float(path, axis.low, axis.high, sampling="log")
            else:
                space.Choice(path, list(range(len(axis))))  # by number: a value may be of any type
        size = {"max_epochs": spec.recipe.epochs} if spec.search == "hyperband" else {"max_trials": spec.trials}
        # To keras-tuner 0 is no seed, and the next seed gives the same settings but for the first.
        seed = 1 + 100_003 * spec.recipe.seed % 2**31
        self._oracle = ORACLES[spec.search](
            objective=OBJECTIVE, hyperparameters=space, tune_new_entries=False, seed=seed, **size
        )
        self._oracle.verbose = 0
        self._oracle.save = self._oracle._save_trial = lambda *_: None  # a restart reads the folders of the trials

    def advance(self, result: Callable[[Setting], float | None]) -> None:
        """Propose as many settings as the results allow; `result` gives the score of a setting, None for not yet."""
        blind, lag = self.spec.search in LISTS, self.spec.parallel
        while not self.over:
            trial = None
            if blind or len(self.settings) - self._told < lag:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # scikit-learn's, on fits of few points
                    trial = self._oracle.create_trial(str(len(self.settings)))
                if trial.status == "STOPPED":
                    self.over = True
                    return
            if trial is not None and trial.status == "RUNNING":
                self._trials.append(trial)
                self.settings.append(self._setting(trial.hyperparameters.values))
                if not blind:
                    continue
            # Here the oracle must know more before it goes on.
            value = 0.0 if blind else result(self.settings[self._told])
            if value is None:
                return
            self._tell(self._trials[self._told], value)

    def _tell(self, trial, value: float) -> None:
        self._oracle.update_trial(trial.trial_id, {OBJECTIVE.name: value})
        trial.status = "COMPLETED"
        self._oracle.end_trial(trial)
        self._told += 1

    def _setting(self, values: dict) -> Setting:
        pairs = [
            (path, rounded(values[path]) if isinstance(axis, Range) else axis[values[path]])
            for path, axis in self.spec.axes.items()
        ]
        if "tuner/epochs" in values:
            pairs.append((EPOCHS, values["tuner/epochs"]))
        return Setting(self.model, tuple(pairs))


class Plan:
    """All trials of a scan, and the results of those whose folders are finished."""

    def __init__(self, spec: Spec, out: pathlib.Path):
        self.spec, self.out = spec, out
        self.results: dict[str, dict] = {}
        self._searches = [Search(spec, model) for model in spec.models]
        self._lock = threading.Lock()  # a chief is asked in one thread and watched in another
        self.update()

    @property
    def trials(self) -> list[Trial]:
        """In the order of the table: by model, then as proposed, then by seed."""
        settings = [setting for search in self._searches for setting in search.settings]
        return [Trial(setting, seed) for setting in dict.fromkeys(settings) for seed in self.spec.seeds]

    @property
    def complete(self) -> bool:
        """Whether every trial is known, however many of them are done."""
        return all(search.over for search in self._searches)

    @property
    def finished(self) -> bool:
        """Whether every trial is known and done."""
        return self.complete and all(trial.name in self.results for trial in self.trials)

    def update(self) -> None:
        """Read the folders that have finished since, and propose what follows from them."""
        with self._lock:
            for search in self._searches:
                search.advance(self._score)
            for trial in self.trials:
                self._result(trial)

    def _result(self, trial: Trial) -> dict | None:
        if trial.name not in self.results:
            found = result(self.out / trial.name)
            if found is None:
                return None
            self.results = {**self.results, trial.name: found}  # another thread may be looking at the old one
        return self.results[trial.name]

    def _score(self, setting: Setting) -> float | None:
        every = [self._result(Trial(setting, seed)) for seed in self.spec.seeds]
        return None if None in every else sum(map(score, every)) / len(every)
