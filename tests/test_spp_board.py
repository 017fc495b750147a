"""What TensorBoard reads of a signal propagation record."""

import numpy as np
import pytest
from conftest import crossentropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfzoo
from nfzoo import spp


def test_tensorboard_reads_what_the_table_has(images, tmp_path):
    model = nfzoo.build("nf_test_resnet")
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(
        *images,
        what=spp.WHAT,
        statistics=["acv", "histogram"],
        log_dir=tmp_path / "log",
        tensorboard=tmp_path / "board",
    )
    model.fit(*images, epochs=2, verbose=0, callbacks=[probe])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    table = spp.read(tmp_path / "log")
    kernel = table[(table.kind == "weight") & (table.layer == "stage1_block1_conv1/kernel")]
    scalars = board.Scalars("acv/weight/stage1_block1_conv1/kernel")
    assert [event.step for event in scalars] == kernel.step.tolist() == [0, 1, 2]
    assert [event.value for event in scalars] == pytest.approx(kernel.acv.tolist())
    assert {f"value/parameter/{path}" for path in table[table.kind == "parameter"].layer} <= set(
        board.Tags()["scalars"]
    )
    event = board.Histograms("histogram/weight/stage1_block1_conv1/kernel")[-1].histogram_value
    # TensorBoard leaves empty bins at the ends out.
    limits, shares = np.array(event.bucket_limit), np.array(event.bucket)
    values = model.get_layer("stage1_block1_conv1").kernel.numpy().ravel()
    assert shares.sum() == pytest.approx(1)
    inside = np.mean(values <= limits[len(limits) // 2])
    assert shares[: len(limits) // 2 + 1].sum() == pytest.approx(inside, abs=2e-3)
