"""The package name under which Keras finds our classes in a saved model."""

import keras

register = keras.saving.register_keras_serializable(package="nfzoo")
