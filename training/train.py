"""A training loop to copy and edit: one model, AGC, signal propagation, plain Keras.

python training/train.py
"""

import keras
from rich.console import Console

import nfzoo
from nfzoo import data, plots, recipes

MODEL = "nf_efficientnet_b0"
EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 3, 64, 1e-3, 0


def main() -> None:
    """Train on the embedded digits; change the constants above, or what follows."""
    keras.utils.set_random_seed(SEED)
    images = data.load(recipes.Data(name="digits"), SEED)
    constants = {"mean": images.mean, "std": images.std, "seed": SEED}
    augment = recipes.Augment(crop_padding=2)
    train = data.Batches(images.train, BATCH_SIZE, shuffle=True, augment=augment, **constants)
    validation = data.Batches(images.validation, BATCH_SIZE, **constants)

    model = nfzoo.build(MODEL, classes=len(images.classes), input_shape=images.train.images.shape[1:])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    model.compile(optimizer, loss, metrics=["accuracy"], agc=nfzoo.AGC(0.1, log_clipped=True))
    probe = nfzoo.SignalPropagation(*data.Batches(data.subset(images.train, 128), 128, images.mean, images.std)[0])
    callbacks = [data.EpochClock(train), probe]
    model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks, shuffle=False)
    plots.save(plots.signal_propagation({MODEL: probe.table()}), "runs/train/signal_propagation.png")
    model.save("runs/train/model.keras")
    Console().print("wrote runs/train/signal_propagation.png and runs/train/model.keras")


if __name__ == "__main__":
    main()
