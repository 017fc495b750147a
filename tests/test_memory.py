"""Counted memory: by hand on a small network, and in the order of what is measured."""

import keras
import pytest
from keras import layers

import nfzoo
from nfzoo import memory


def test_by_hand():
    x = keras.Input((8, 8, 2))
    y = layers.Conv2D(4, 3, padding="same")(x)  # keeps its input, 128 numbers
    y = layers.BatchNormalization()(y)  # its input, 256
    y = layers.Activation("relu")(y)  # its output, 256
    z = layers.Conv2D(4, 1)(y)  # the same tensor
    z = nfzoo.layers.Tap()(layers.Add()([y, z]))  # nothing
    z = layers.Activation("silu")(z)  # its input, 256: the sum, seen through the tap
    z = layers.Dense(3)(layers.GlobalAveragePooling2D()(z))  # 4 means
    found = memory.stored(keras.Model(x, z))
    assert found.kept == 4 * (128 + 256 + 256 + 256 + 4)
    assert found.outputs == 4 * (6 * 256 + 4 + 3)
    assert found.weights == 4 * (3 * 3 * 2 * 4 + 4 + 4 * 4 + 4 * 4 + 4 + 4 * 3 + 3)
    assert memory.stored(keras.Model(x, z), 2).kept == found.kept / 2


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_network_in_another_and_activations_in_layers_count_alike(activation):
    def network(fused, nested):
        image = x = keras.Input((8, 8, 2))
        for filters in (4, 6):
            x = layers.Conv2D(filters, 3, activation=activation if fused else None)(x)
            x = x if fused else layers.Activation(activation)(x)
        if not nested:
            return keras.Model(image, layers.Dense(3)(layers.Flatten()(layers.Activation("tanh")(x))))
        outer, body = keras.Input((8, 8, 2)), keras.Model(image, layers.Activation("tanh")(x))
        return keras.Model(outer, layers.Dense(3)(layers.Flatten()(body(layers.Identity()(outer)))))

    plain = memory.stored(network(False, False)).kept
    assert plain > 4 * (128 + 144 + 96)
    for fused, nested in ((False, True), (True, False), (True, True)):
        assert memory.stored(network(fused, nested)).kept == plain


def test_batch_normalization_keeps_what_its_twins_do_not():
    kept = {
        name: memory.stored(nfzoo.build(f"{name}_resnet26", input_shape=(64, 64, 3))).kept
        for name in ("bn", "gn", "none", "skipinit", "rescale")
    }
    assert kept["bn"] == kept["gn"] > 1.3 * kept["none"]
    assert kept["none"] < kept["skipinit"] < kept["bn"]
    assert kept["rescale"] > kept["bn"]  # maps before and after a shift


def test_a_factor_behind_an_activation_gives_a_map_of_its_own():
    inside, behind = (
        memory.stored(nfzoo.build("nf_resnet26", input_shape=(64, 64, 3), activation="relu", gamma_in=place)).kept
        for place in ("kernel", "activation")
    )
    assert behind > 1.1 * inside


def test_sizes_must_be_fixed():
    with pytest.raises(ValueError, match="fixed input size"):
        memory.stored(nfzoo.build("bn_test_resnet", include_top=False, input_shape=(None, None, 3)))


def test_the_command(capsys):
    from nfzoo.cli import app

    app(["info", "bn_resnet50", "--memory", "--json"], standalone_mode=False)
    import json

    told = json.loads(capsys.readouterr().out)
    assert told["kept"] > 50e6 and told["weights"] == 4 * nfzoo.build("bn_resnet50").count_params()
