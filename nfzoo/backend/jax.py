"""Training step and probe for the JAX backend."""

import contextlib
import functools

import jax
import keras

from nfzoo.backend.taps import (
    TINY,
    check_step,
    clipping,
    loss_counters,
    loss_scale,
    loss_state,
    own_losses,
    recording,
    training_mode,
    unscaled,
)


class Step:
    """`train_step` with adaptive gradient clipping; without an `agc`, Keras' own."""

    def train_step(self, state, data):
        return super().train_step(state, data) if self.agc is None else train_step(self, state, data)


def train_step(model: keras.Model, state, data, live=None, taps=None):
    """One step of Keras' own kind, with clipping and `live`; see `nfzoo.backend.tensorflow.train_step`."""
    agc = getattr(model, "agc", None)
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def forward(trainable, zeros):
        with tapped(model, taps or {}, zeros) as seen:
            loss, updates = model.compute_loss_and_updates(
                trainable, non_trainable, metrics_variables, x, y, sample_weight,
                training=True, optimizer_variables=optimizer_variables,
            )  # fmt: skip
        return loss, (updates, seen)

    zeros = _zeros_at(jax.eval_shape(lambda t: forward(t, {})[1][1], trainable)) if live else {}
    (_, (updates, seen)), gradients = jax.value_and_grad(forward, (0, 1), has_aux=True)(trainable, zeros)
    loss, y_pred, non_trainable, metrics_variables = updates
    raw, at_taps = gradients
    with keras.StatelessScope(state_mapping=list(zip(model.optimizer.variables, optimizer_variables, strict=True))):
        scale = model.optimizer.scale_loss(1.0)
    before, log = trainable, agc is not None and agc.log_clipped
    clipped = agc.clip(raw, trainable, model.agc_axes(), scale)[1] if log else None
    with clipping(model):
        trainable, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, raw, trainable)
    with keras.StatelessScope(list(zip(model.metrics_variables, metrics_variables, strict=True))) as scope:
        if live:
            paths = [v.path for v in model.trainable_variables]
            by_path = [dict(zip(paths, values, strict=True)) for values in (trainable, raw, before)]
            live.update_state(seen, by_path[0], unscaled(at_taps, scale), unscaled(by_path[1], scale), by_path[2])
        if log:
            model.clipped_share.update_state(clipped)
    metrics_variables = [scope.get_current_value(v) for v in model.metrics_variables]
    logs, metrics_variables = model._update_metrics_variables(metrics_variables, loss, x, y, y_pred, sample_weight)
    return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)


def observe(model: keras.Model, live, taps: dict[str, keras.Layer]):
    """A training step for a model that tells `live` of its tensors; see `nfzoo.backend.tensorflow.observe`."""
    check_step(model, Step)
    return functools.partial(train_step, model, live=live, taps=taps)


@contextlib.contextmanager
def tapped(model: keras.Model, taps: dict[str, keras.Layer], zeros: dict):
    """See the outputs of tapped layers, with `zeros` added: JAX differentiates by inputs only, such as these."""
    seen = {}

    def see(name, value):
        seen[name] = value + zeros[name] if name in zeros else value
        return seen[name]

    with recording(model, taps, see):
        yield seen


def _zeros_at(shapes: dict) -> dict:
    floating = {name: s for name, s in shapes.items() if jax.numpy.issubdtype(s.dtype, jax.numpy.floating)}
    return {name: jax.numpy.zeros(s.shape, s.dtype) for name, s in floating.items()}


def deterministic(wanted: bool):
    """XLA is, on a CPU; on a GPU if XLA_FLAGS=--xla_gpu_deterministic_ops=true was set before JAX started."""
    return contextlib.nullcontext()


def data_parallel():
    """Where a model is made for all devices to share its batches, those of other processes too."""
    return keras.distribution.DataParallel(auto_shard_dataset=False).scope()


def split_cpu(parts: int) -> None:
    """Let the CPU count as several devices; before anything is computed."""
    jax.config.update("jax_num_cpu_devices", parts)


def device_count() -> int:
    """Devices that share a batch, those of other processes too."""
    return jax.device_count()


def sync(model: keras.Model) -> None:
    """Write the state that `fit` carries between steps back into the model's variables."""
    model.jax_state_sync()


def feed(batches: keras.utils.PyDataset) -> keras.utils.PyDataset:
    """Batches as `fit` and `evaluate` read them: as they are."""
    return batches


def scope(model: keras.Model):
    """Where variables beside those of a model are made: anywhere."""
    return contextlib.nullcontext()


def signals(model: keras.Model, taps: dict[str, keras.Layer], compute_loss, reduce):
    """Compile a probe of one model; see `nfzoo.backend.tensorflow.signals`, of which this is the equivalent.

    Every tapped output gets a zero added, by which the loss is differentiated.
    """
    paths = [v.path for v in model.trainable_variables]
    scale, mode = loss_scale(model), training_mode(model)

    @jax.jit
    def run(x, y, trainable, non_trainable, counters):
        def forward(trainable, zeros):
            with tapped(model, taps, zeros) as seen:
                outputs, _, own = model.stateless_call(trainable, non_trainable, x, return_losses=True, **mode)
            with keras.StatelessScope(loss_state(model, trainable, counters)), own_losses(model, own):
                loss = 0.0 if compute_loss is None else compute_loss(x, y, outputs) * scale
            return loss, seen

        if compute_loss is None:
            return reduce(forward(trainable, {})[1], dict(zip(paths, trainable, strict=True)), {}, {})
        zeros = _zeros_at(jax.eval_shape(lambda t: forward(t, {})[1], trainable))
        (_, values), gradients = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(trainable, zeros)
        weights, at_weights = (dict(zip(paths, values, strict=True)) for values in (trainable, gradients[0]))
        return reduce(values, weights, unscaled(gradients[1], scale), unscaled(at_weights, scale))

    def call(x, y):
        groups = (model.trainable_variables, model.non_trainable_variables, loss_counters(model))
        return run(x, y, *([v.value for v in group] for group in groups))

    return call


def conv(x, kernel, strides, padding: str, dilation_rate=1):
    """2D convolution, channels last; see `nfzoo.backend.tensorflow.conv`."""
    return keras.ops.conv(x, kernel, strides, padding, dilation_rate=dilation_rate)


def depthwise_conv(x, kernel, strides, padding: str, dilation_rate):
    """Depthwise convolution, channels last; see `nfzoo.backend.tensorflow.depthwise_conv`."""
    return keras.ops.depthwise_conv(x, kernel, strides, padding, dilation_rate=dilation_rate)


def standardize_columns(matrix, scale, epsilon: float):
    """scale * (matrix - mean) / sqrt(variance + epsilon) of every column."""
    return (matrix - matrix.mean(0)) * (scale * jax.lax.rsqrt(matrix.var(0) + epsilon))


def column_moments(matrix):
    """Mean and population variance of every column, and the columns standardized by them (0 where all are equal)."""
    mean, variance = matrix.mean(0), matrix.var(0)
    return mean, variance, (matrix - mean) * jax.lax.rsqrt(variance + TINY)


def batch_normalize(x, scale, offset, epsilon: float):
    """Normalized over all axes but the last; see `nfzoo.backend.tensorflow.batch_normalize`."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    return (x - mean) * (scale * jax.lax.rsqrt(variance + epsilon)) + offset, mean, variance
