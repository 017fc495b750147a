"""Signal propagation: what a network does to activations, weights and gradients, measured on one batch during `fit`.

The quantities are those of Brock et al. 2021 (NF-ResNet, arXiv 2101.08692, section 3) and of the poster "Designing
Normalizer-Free EfficientNets"; `stats.py` has one function for each. Plots and pandas read the log, never the
model.
"""

from nfzoo.spp.callback import SignalPropagation, log_spaced
from nfzoo.spp.live import LiveSignals
from nfzoo.spp.log import SignalLog, read, read_meta
from nfzoo.spp.probe import Probe, snapshot
from nfzoo.spp.reduction import KINDS, WHAT
from nfzoo.spp.stats import STATS, Signal, edges, statistic, statistics
from nfzoo.spp.taps import place, select_taps

__all__ = [
    "KINDS",
    "STATS",
    "WHAT",
    "LiveSignals",
    "Probe",
    "Signal",
    "SignalLog",
    "SignalPropagation",
    "edges",
    "log_spaced",
    "place",
    "read",
    "read_meta",
    "select_taps",
    "snapshot",
    "statistic",
    "statistics",
]
