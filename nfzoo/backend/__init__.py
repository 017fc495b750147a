"""What differs between Keras backends: one training step with AGC, and the signals of one probe.

Each module exports `Step` (a mixin for `keras.Model` with `train_step`), `conv(...)` (grouped too),
`depthwise_conv(...)`, `batch_normalize(...)`, `standardize_columns(...)`, `column_moments(...)`, `signals(...)`,
`observe(...)`, `sync(model)`, which brings the variables of a model up to date in the middle of `fit`,
`feed(batches)`, `deterministic(wanted)`, `data_parallel()` and `device_count()`; the active one is chosen here, once.
"""

import keras

if keras.config.backend() == "tensorflow":
    from nfzoo.backend.tensorflow import (
        Step,
        batch_normalize,
        column_moments,
        conv,
        data_parallel,
        depthwise_conv,
        deterministic,
        device_count,
        feed,
        observe,
        scope,
        signals,
        split_cpu,
        standardize_columns,
        sync,
    )
elif keras.config.backend() == "jax":
    from nfzoo.backend.jax import (
        Step,
        batch_normalize,
        column_moments,
        conv,
        data_parallel,
        depthwise_conv,
        deterministic,
        device_count,
        feed,
        observe,
        scope,
        signals,
        split_cpu,
        standardize_columns,
        sync,
    )
else:
    raise ImportError(
        f"nfzoo runs on the Keras backends tensorflow and jax. Received: {keras.config.backend()!r}. "
        "Set the environment variable KERAS_BACKEND to one of them before importing keras."
    )

__all__ = [
    "Step", "batch_normalize", "column_moments", "conv", "data_parallel", "depthwise_conv", "deterministic",
    "device_count", "feed", "observe", "scope", "signals", "split_cpu", "standardize_columns", "sync",
]  # fmt: skip
