"""Learning rates: scans that survive anything, and the range test.

`scan` trains models in many settings (`space.py`), which keras-tuner's oracles propose (`plan.py`); a trial
(`trials.py`) is the folder of an ordinary run, in this process or in workers (`workers.py`), shown as it goes
(`progress.py`) and summed up (`results.py`). `lr_find` needs no scan: it sweeps the learning rate within one short
training (`lr_range.py`).
"""

from nfzoo.tune.lr_range import RangeTest, lr_find, prepare
from nfzoo.tune.results import best, command, summary, table
from nfzoo.tune.search import scan, scanned
from nfzoo.tune.space import Range, spec, trial_name

__all__ = [
    "Range",
    "RangeTest",
    "best",
    "command",
    "lr_find",
    "prepare",
    "scan",
    "scanned",
    "spec",
    "summary",
    "table",
    "trial_name",
]
