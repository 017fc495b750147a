"""What a scan is doing, read from its folders: a table that lives in a terminal, a line per trial elsewhere."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from nfzoo.tune.plan import Plan, score
from nfzoo.tune.trials import busy

PERIOD = 1.0  # seconds


class Progress:
    """Counts what is done; `view` is the table, `lines` says what has finished since it was asked last."""

    def __init__(self, plan: Plan):
        self.plan, self.began = plan, time.monotonic()
        self.before = self.said = set(plan.results)

    def left(self, done: int, total: int) -> str:
        """Time that the known trials will take, by those that finished since the start."""
        finished = done - len(self.before)
        if not finished:
            return ""
        seconds = (time.monotonic() - self.began) / finished * (total - done)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d} left"

    def best(self) -> str:
        """The best trial so far, in words."""
        scores = {name: score(metrics) for name, metrics in self.plan.results.items()}
        if not any(scores.values()):
            return "none yet"
        name = max(scores, key=scores.get)
        return f"{name}, validation {100 * scores[name]:.1f} %"

    def counts(self) -> tuple[int, int, str]:
        """Trials done, trials known, both in words."""
        trials = self.plan.trials
        done = sum(trial.name in self.plan.results for trial in trials)
        more = "" if self.plan.complete else " or more"
        return done, len(trials), f"{done}/{len(trials)}{more} done"

    def view(self) -> Table:
        """The table of this moment."""
        done, total, words = self.counts()
        statuses = [metrics["status"] for metrics in self.plan.results.values()]
        failed = [f"{statuses.count(s)} {s.replace('_', ' ')}" for s in ("diverged", "out_of_memory") if s in statuses]
        grid = Table.grid(padding=(0, 2))
        grid.add_row("[bold]scan", "  ".join([words, *failed, self.left(done, total)]))
        grid.add_row("best trial", self.best())
        for trial in self.plan.trials:
            if trial.name not in self.plan.results and busy(self.plan.out, trial.name):
                grid.add_row("running", f"{trial.name}  {self._epochs(trial)}")
        return grid

    def _epochs(self, trial) -> str:
        asked = dict(trial.setting.values).get("epochs", self.plan.spec.recipe.epochs)
        with contextlib.suppress(OSError):
            seen = (self.plan.out / trial.name / "history.csv").read_text().count("\n") - 1
            return f"epoch {seen}/{asked}"
        return f"epoch 0/{asked}"

    def lines(self) -> list[str]:
        """A line per trial that has finished since the last call."""
        results, (_, total, _) = self.plan.results, self.counts()
        new, self.said = [name for name in results if name not in self.said], set(results)
        texts = []
        for number, name in enumerate(new, len(results) - len(new) + 1):
            metrics = results[name]
            reached = metrics.get("val_accuracy")
            reached = "" if reached is None else f", validation {100 * reached:.1f} %"
            texts.append(
                f"{number}/{total} {name}: {metrics['status'].replace('_', ' ')}{reached}  {self.left(number, total)}"
            )
        return texts


@contextlib.contextmanager
def shown(plan: Plan, console: Console) -> Iterator[None]:
    """Show the progress of a plan until the block ends."""
    progress, over = Progress(plan), threading.Event()
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else _Lines(console) as live:

        def refresh() -> None:
            plan.update()
            live.update(progress.view() if console.is_terminal else progress.lines(), refresh=True)

        def watch() -> None:
            while not over.wait(PERIOD):
                refresh()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            refresh()


class _Lines:
    """What `Live` is to a terminal, for a file: lines that stay."""

    def __init__(self, console: Console):
        self.console = console

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def update(self, lines: list[str], refresh: bool) -> None:
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
