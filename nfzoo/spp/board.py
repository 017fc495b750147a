"""Records for TensorBoard, by its own writer: no TensorFlow needed."""

import pathlib
import time
from collections.abc import Sequence

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

_PLACED = ("step", "epoch", "kind", "layer", "place", "depth", "source", "first_bad")


class Board:
    """Writes records as scalars "statistic/kind/layer", and histograms as histograms, under one folder.

    Args:
        folder: what `tensorboard --logdir` is given.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = str(folder)
        self.writer: EventFileWriter | None = None  # made when needed: it holds a thread, which cannot be copied

    def add(self, records: Sequence[dict], edges: np.ndarray) -> None:
        """Add records of one step."""
        if self.writer is None:
            self.writer = EventFileWriter(self.folder)
        values: dict[int, list] = {}
        for record in records:
            for name in record.keys() - _PLACED:
                tag = f"{name}/{record['kind']}/{record['layer']}"
                if name == "histogram":
                    value = Summary.Value(tag=tag, histo=_histogram(record[name], edges))
                elif isinstance(record[name], float):
                    value = Summary.Value(tag=tag, simple_value=record[name])
                else:
                    continue  # a histogram of every channel has no place there
                values.setdefault(record["step"], []).append(value)
        for step, found in values.items():
            self.writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=found)))

    def __getstate__(self) -> dict:
        return {**vars(self), "writer": None}  # a copy opens a file of its own

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()


def _histogram(shares: Sequence[float], edges: np.ndarray) -> HistogramProto:
    """TensorBoard's form: counts up to each limit. The open bins end ten times beyond the last edge."""
    limits = [*edges, 10 * edges[-1]]
    return HistogramProto(
        min=10 * edges[0], max=limits[-1], num=1, sum=0, sum_squares=0, bucket_limit=limits, bucket=shares
    )
