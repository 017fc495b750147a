"""The statistics against NumPy, on whichever backend runs (see test_spp_backends)."""

import keras
import numpy as np
import pytest

from nfzoo import spp
from nfzoo.spp.stats import Signal

RNG = np.random.default_rng(0)


def test_constant_channels_have_a_mean_and_no_variance():
    x = np.broadcast_to(np.array([1.0, -2.0, 3.0], "float32"), (4, 5, 5, 3))
    got = {k: float(v) for k, v in spp.statistics(x).items()}
    assert got == pytest.approx({"acsm": 14 / 3, "acv": 0.0, "second_moment": 14 / 3})


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (7, 3)])
def test_statistics_equal_numpy(shape):
    x = np.random.default_rng(0).normal(0.5, 2, shape).astype("float32")
    got = {k: float(v) for k, v in spp.statistics(x).items()}
    channels = x.reshape(-1, shape[-1]).astype("float64")
    expected = {
        "acsm": np.mean([c.mean() ** 2 for c in channels.T]),
        "acv": np.mean([np.mean((c - c.mean()) ** 2) for c in channels.T]),
        "second_moment": np.mean(channels**2),
    }
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_posters_reading_takes_dense_tensors_as_one_vector():
    x = np.random.default_rng(0).normal(0.5, 2, (7, 3)).astype("float32")
    flat = spp.statistics(x, None, "poster", flat=True)
    assert float(flat["acsm"]) == pytest.approx(np.mean(x**2), rel=1e-5)
    assert float(flat["acv"]) == pytest.approx(x.var(), rel=1e-5)
    assert float(spp.statistics(x)["acsm"]) != pytest.approx(float(flat["acsm"]), rel=0.1)
    maps = np.random.default_rng(0).normal(0.5, 2, (2, 4, 4, 3)).astype("float32")
    assert {k: float(v) for k, v in spp.statistics(maps, None, "poster").items()} == pytest.approx(
        {k: float(v) for k, v in spp.statistics(maps).items()}
    )


NUMPY = {
    "acsm": lambda x: np.mean(x.mean((0, 1, 2)) ** 2),
    "acv": lambda x: np.mean(x.var((0, 1, 2))),
    "second_moment": lambda x: np.mean(x**2),
    "mean": np.mean,
    "norm": lambda x: np.linalg.norm(x.ravel()),
    "kurtosis": lambda x: np.mean(((x - x.mean((0, 1, 2))) ** 4).mean((0, 1, 2)) / x[..., :].var((0, 1, 2)) ** 2),
    "nonzero": lambda x: np.count_nonzero(x) / x.size,
    "dead": lambda x: np.mean([not x[..., c].any() for c in range(x.shape[-1])]),
    "saturated": lambda x: np.mean(
        [np.mean((c >= c.max() - 0.01 * np.ptp(c)) | (c <= c.min() + 0.01 * np.ptp(c))) for c in np.moveaxis(x, -1, 0)]
    ),
}


def test_every_statistic_equals_numpy():
    x = np.maximum(RNG.standard_normal((4, 5, 5, 6)), 0)
    got = spp.statistics(x, names=tuple(spp.STATS))
    assert got.keys() == NUMPY.keys() | {"histogram", "channel_histogram"}
    for name, function in NUMPY.items():
        assert float(got[name]) == pytest.approx(float(function(x)), rel=1e-5), name
    x[..., 2] = 0
    assert float(spp.statistics(x, names=["dead"])["dead"]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3])
def test_no_statistic_depends_on_the_scale_of_a_signal(scale):
    """The fourth power of a gradient of 1e-12 is less than float32 can say."""
    x = np.random.default_rng(1).standard_normal((16, 8, 8, 4)).astype("float32")
    names = ("kurtosis", "nonzero", "dead", "saturated")
    plain, scaled = ({k: float(v) for k, v in spp.statistics(a, names=names).items()} for a in (x, scale * x))
    assert scaled == pytest.approx(plain, rel=1e-3) and plain["kurtosis"] == pytest.approx(3, abs=0.3)
    assert float(spp.statistics(scale * x)["acv"]) == pytest.approx(scale**2, rel=0.1)


def test_a_kernel_is_taken_by_its_units():
    kernel = np.random.default_rng(0).normal(1, 2, (3, 3, 6, 1)).astype("float32")  # depthwise: a unit per channel
    got = {k: float(v) for k, v in spp.statistics(kernel, (0, 1)).items()}
    assert got["acv"] == pytest.approx(kernel.var((0, 1)).mean(), rel=1e-5)
    assert got["acsm"] == pytest.approx((kernel.mean((0, 1)) ** 2).mean(), rel=1e-5)


def test_a_single_example_has_no_variance():
    assert float(spp.statistics(np.array([[1.0, 2.0]], "float32"))["acv"]) == 0


def histogram(x: np.ndarray) -> np.ndarray:
    edges = np.concatenate([[-np.inf], spp.edges(), [np.inf]])
    return np.histogram(x, edges)[0] / x.size


def test_histograms_equal_numpy():
    x = np.random.default_rng(0).standard_normal((20, 10, 8)).astype("float32") * np.logspace(-4, 3, 8, dtype="float32")
    x[0, 0] = [0, 1e-9, -1e-9, 5e3, -5e3, 1, -1, 2]
    got = spp.statistics(x, names=["histogram", "channel_histogram"])
    whole, channels = (np.asarray(keras.ops.convert_to_numpy(v)) for v in got.values())
    # An entry on an edge may fall to either side of it, by rounding.
    np.testing.assert_allclose(whole, histogram(x), atol=3 / x.size)
    assert whole[0] > 0 and whole[-1] > 0 and whole[len(whole) // 2] > 0 and whole.sum() == pytest.approx(1)
    assert channels.shape == (8, len(spp.edges()) + 1)
    for i in range(8):
        np.testing.assert_allclose(channels[i], histogram(x[..., i]), atol=3 / 200)
        assert channels[i].sum() == pytest.approx(1)


@pytest.mark.parametrize("channels", [6, 32])  # with 32, even spacing would meet one column of the map only
def test_the_sample_of_a_large_tensor_is_fair(channels):
    """Every channel and every place has its part, and shares are right to a percent."""
    x = np.random.default_rng(0).standard_normal((64, 32, 32, channels)).astype("float32")
    x[:, :, 0] *= 100  # what padding may do to a border
    signal = Signal(keras.ops.convert_to_tensor(x), (0, 1, 2))
    assert 8_000 < signal.sample.shape[0] * signal.sample.shape[1] < 40_000 and signal.sample.shape[1] == channels
    got = np.asarray(keras.ops.convert_to_numpy(spp.statistics(x, names=["histogram"])["histogram"]))
    assert np.abs(np.cumsum(got) - np.cumsum(histogram(x))).max() < 0.02


def test_every_statistic_is_defined():
    told = spp.stats.definitions(tuple(spp.STATS))
    assert all(len(text) > 15 and text.endswith(".") for text in told.values())
    assert "poster" in spp.stats.definitions(["acsm"], "poster")["acsm"]
