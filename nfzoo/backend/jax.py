"""Training step and probe for the JAX backend."""

import jax
import keras

from nfzoo.backend.taps import loss_scale, loss_state, recording, training_mode


class Step:
    """`train_step` with adaptive gradient clipping; without an `agc`, Keras' own."""

    def train_step(self, state, data):
        if self.agc is None:
            return super().train_step(state, data)
        trainable, non_trainable, optimizer_variables, metrics_variables = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        gradient = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (_, (loss, y_pred, non_trainable, metrics_variables)), gradients = gradient(
            trainable, non_trainable, metrics_variables, x, y, sample_weight,
            training=True, optimizer_variables=optimizer_variables,
        )  # fmt: skip
        with keras.StatelessScope(state_mapping=list(zip(self.optimizer.variables, optimizer_variables, strict=True))):
            scale = self.optimizer.scale_loss(1.0)
        gradients, clipped = self.agc.clip(gradients, trainable, self.agc_axes(), scale)
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
        logs, metrics_variables = self._update_metrics_variables(metrics_variables, loss, x, y, y_pred, sample_weight)
        if self.agc.log_clipped:
            logs = {**logs, "agc_clipped": clipped}
        return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)


def sync(model: keras.Model) -> None:
    """Write the state that `fit` carries between steps back into the model's variables."""
    model.jax_state_sync()


def signals(model: keras.Model, taps: dict[str, keras.Layer], compute_loss, reduce):
    """Compile a probe of one model; see `nfzoo.backend.tensorflow.signals`, of which this is the equivalent.

    JAX differentiates by inputs only: every tapped output gets a zero added, by which the loss is differentiated.
    """
    paths = [v.path for v in model.trainable_variables]
    scale, mode = loss_scale(model), training_mode(model)

    @jax.jit
    def run(x, y, trainable, non_trainable, counters):
        def forward(trainable, zeros):
            seen = {}

            def see(name, value):
                seen[name] = value + zeros[name] if name in zeros else value
                return seen[name]

            with recording(taps, see):
                outputs, _ = model.stateless_call(trainable, non_trainable, x, **mode)
            with keras.StatelessScope(loss_state(model, trainable, counters)):
                loss = 0.0 if compute_loss is None else compute_loss(x, y, outputs) * scale
            return loss, seen

        if compute_loss is None:
            return reduce(forward(trainable, {})[1], dict(zip(paths, trainable, strict=True)), {}, {})
        shapes = jax.eval_shape(lambda t: forward(t, {})[1], trainable)
        zeros = {name: jax.numpy.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        (_, values), gradients = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(trainable, zeros)
        at_weights, at_taps = jax.tree.map(lambda g: g.astype(_wide(g)) / scale, gradients)
        weights = dict(zip(paths, trainable, strict=True))
        return reduce(values, weights, at_taps, dict(zip(paths, at_weights, strict=True)))

    def call(x, y):
        groups = (model.trainable_variables, model.non_trainable_variables, model.metrics_variables)
        return run(x, y, *([v.value for v in group] for group in groups))

    return call


def _wide(gradient):
    return "float32" if gradient.dtype in ("float16", "bfloat16") else gradient.dtype


def conv(x, kernel, strides, padding: str, dilation_rate=1):
    """2D convolution, channels last; see `nfzoo.backend.tensorflow.conv`."""
    return keras.ops.conv(x, kernel, strides, padding, dilation_rate=dilation_rate)


def standardize_columns(matrix, scale, epsilon: float):
    """scale * (matrix - mean) / sqrt(variance + epsilon) of every column."""
    return (matrix - matrix.mean(0)) * (scale * jax.lax.rsqrt(matrix.var(0) + epsilon))
