"""Training step and probe for the JAX backend."""

import jax
import keras


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


class _Perturb(keras.layers.Layer):
    """Add the zero that a tap is differentiated by: JAX has gradients of inputs only."""

    zeros: dict = {}

    def call(self, inputs):
        zero = self.zeros.get(self.name)
        return inputs if zero is None else inputs + zero


def signals(model: keras.Model, taps: list[str], compute_loss, reduce):
    """Compile a probe of one model; see `nfzoo.backend.tensorflow.signals`, of which this is the equivalent."""
    outputs = {}

    def tapped(layer, *args, **kwargs):
        value = layer(*args, **kwargs)
        if layer.name in taps:
            value = outputs[layer.name] = _Perturb(name=f"{layer.name}__probe")(value)
        return value

    view = keras.Model(model.input, model.outputs[0])  # uncompiled, so that the clone is
    clone = keras.models.clone_model(view, call_function=tapped)
    probe = keras.Model(clone.input, {"taps": outputs, "outputs": clone.outputs[0]})
    paths = [v.path for v in view.trainable_variables]

    @jax.jit
    def run(x, y, trainable, non_trainable):
        def forward(trainable, zeros):
            _Perturb.zeros = zeros
            values, _ = probe.stateless_call(trainable, non_trainable, x, training=True)
            _Perturb.zeros = {}
            loss = 0.0 if compute_loss is None else compute_loss(y, values["outputs"])
            return loss, values["taps"]

        if compute_loss is None:
            return reduce(forward(trainable, {})[1], dict(zip(paths, trainable, strict=True)), {}, {})
        shapes = jax.eval_shape(lambda t: forward(t, {})[1], trainable)
        zeros = {f"{name}__probe": jax.numpy.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        (_, values), gradients = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(trainable, zeros)
        at_weights, at_taps = gradients
        return reduce(
            values,
            dict(zip(paths, trainable, strict=True)),
            {name: at_taps[f"{name}__probe"] for name in values},
            dict(zip(paths, at_weights, strict=True)),
        )

    def call(x, y):
        return run(x, y, [v.value for v in view.trainable_variables], [v.value for v in view.non_trainable_variables])

    return call


def conv(x, kernel, strides, padding: str, dilation_rate=1):
    """2D convolution, channels last; see `nfzoo.backend.tensorflow.conv`."""
    return keras.ops.conv(x, kernel, strides, padding, dilation_rate=dilation_rate)
