"""What a training step makes is made before it is traced: TensorFlow compiles it once, and nothing else changes."""

import keras
import numpy as np
import pytest
from conftest import crossentropy, same

import nfzoo
from nfzoo.backend import Step

NAME = "sn_test_ffnn"  # dropout_rate is an option of all


class Counting(keras.optimizers.Adam):
    """Counts how often a step with it is traced."""

    traced = 0

    def apply(self, *args, **kwargs):
        self.traced += 1
        super().apply(*args, **kwargs)


def _model(cls=None, **options):
    keras.utils.set_random_seed(0)
    model = nfzoo.build(NAME, classes=10, input_shape=(32, 32, 3), dropout_rate=0.3)
    if cls is not None:
        model = cls(model.inputs, model.outputs)
    model.compile(Counting(1e-3, use_ema=True), crossentropy(), metrics=["accuracy"], **options)
    return model


@pytest.mark.parametrize("agc", [None, nfzoo.AGC(0.01, log_clipped=True)], ids=["plain", "agc"])
def test_a_step_is_traced_once_and_computes_what_keras_computes(agc, images, monkeypatch):
    x, y = images
    trained = []
    for keras_alone in (False, True):
        if keras_alone:
            monkeypatch.delattr(Step, "_maybe_symbolic_build")
        model = _model(agc=agc)
        history = model.fit(x, y, batch_size=3, epochs=2, validation_data=(x, y), verbose=0).history  # 3, 3, 2 images
        trained.append((model, history, model.optimizer.traced))
    (ours, history, traced), (theirs, expected, twice) = trained
    assert (traced, twice) == (1, 2)
    assert history == expected and same(ours, theirs)
    for a, b in zip(ours.optimizer.variables, theirs.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_single_batches_too(images):
    model = _model()
    losses = [model.train_on_batch(*images, return_dict=True)["loss"] for _ in range(3)]
    assert model.optimizer.traced == 1 and losses[2] < losses[0]


def test_no_batch_is_read_for_it(images):
    read = []

    def batches():
        for step in range(4):
            read.append(step)
            yield images

    model = _model()
    model.fit(batches(), steps_per_epoch=4, shuffle=False, verbose=0)  # a batch too few is a warning, and an error here
    assert int(model.optimizer.iterations) == 4 and read == [0, 1, 2, 3] and model.optimizer.traced == 1


def test_an_evaluation_makes_no_variables_of_the_optimizer(images):
    model = _model()
    model.evaluate(*images, verbose=0)
    model.test_on_batch(*images)
    assert not model.optimizer.built


class OwnLoss(nfzoo.NFModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred[0] if isinstance(y_pred, list) else y_pred, sample_weight)


class OwnStep(nfzoo.NFModel):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("cls", [OwnLoss, OwnStep])
def test_a_step_of_ones_own_is_left_to_keras(cls, images, monkeypatch):
    model = _model(cls)
    monkeypatch.setattr(model, "_symbolic_build", lambda **_: pytest.fail("it may know nothing of such a step"))
    model.fit(*images, verbose=0)
    assert int(model.optimizer.iterations) == 1
