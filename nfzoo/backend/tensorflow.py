"""Training step and probe for the TensorFlow backend."""

import contextlib
import functools

import keras
import tensorflow as tf
from tensorflow.python.framework import config  # the public module has no way back

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

    def train_step(self, data):
        return super().train_step(data) if self.agc is None else train_step(self, data)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Make what a training step makes at first, metrics and the optimizer's variables, before it is traced.

        TensorFlow traces a function that makes variables a second time, which doubles what compiling takes. Keras
        spares it under a strategy, and there reads a batch for it, which an iterator would not give again.
        """
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        kept = all(
            getattr(type(self), name) is getattr(keras.Model, name) for name in ("compute_loss", "compute_metrics")
        )
        ours = kept and type(self).train_step is Step.train_step and self.built
        if not ours or self._evaluates or self.run_eagerly or self._distribute_strategy is not None:
            return
        if iterator is not None:
            data_batch = iterator._distributed_dataset.element_spec
        absent = (tf.experimental.Optional, tf.OptionalSpec, tf.NoneTensorSpec)
        batch = keras.tree.map_structure(lambda part: None if isinstance(part, absent) else part, data_batch)
        self._symbolic_build(data_batch=batch)


def train_step(model: keras.Model, data, live=None, taps=None):
    """One step of Keras' own kind, with adaptive gradient clipping where the model has an `agc`.

    Args:
        live: told of the step's tensors by `live.update_state`, see `observe`.
        taps: name -> layer whose output it is told.
    """
    agc, seen = getattr(model, "agc", None), {}
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape() as tape:
        with recording(model, taps or {}, lambda name, value: seen.setdefault(name, value)):
            y_pred = model(x, **training_mode(model))
        # The method of its own kind that fits a `compute_loss` with and without `training`.
        loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        scaled_loss = model.optimizer.scale_loss(loss)
    variables = model.trainable_variables
    gradients, at_taps = tape.gradient(scaled_loss, [variables, seen]) if variables or seen else ([], {})
    scale = model.optimizer.scale_loss(tf.ones((), loss.dtype))

    # Under a strategy each replica holds the gradient of its share of the loss. The optimizer sums them for itself.
    log = agc is not None and agc.log_clipped
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    raw = _all_reduce(gradients) if replicas > 1 and (live or log) else gradients
    clipped = agc.clip(raw, [v.value for v in variables], model.agc_axes(), scale)[1] if log else None
    before = [tf.identity(v.value) for v in variables] if live else None
    if variables:  # else all is frozen
        with clipping(model):
            model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    if live:
        paths, now = [v.path for v in variables], [v.value for v in variables]
        by_path = [dict(zip(paths, values, strict=True)) for values in (now, raw, before)]
        live.update_state(seen, by_path[0], unscaled(at_taps, scale), unscaled(by_path[1], scale), by_path[2])

    size = tf.shape(next(part for part in tf.nest.flatten(x) if part is not None))[0]  # inputs may be optional
    model._loss_tracker.update_state(loss * replicas, sample_weight=size)
    if log:
        model.clipped_share.update_state(clipped)
    return model.compute_metrics(x, y, y_pred, sample_weight)


def observe(model: keras.Model, live, taps: dict[str, keras.Layer]):
    """A training step for a model that tells `live` of its tensors.

    `live.update_state` gets the tapped outputs, the weights after the step, the gradients at the taps and at the
    weights (before clipping, without the loss scale), and the weights before the step, as dicts.

    Raises:
        ValueError: if the model's class has a training step of its own.
    """
    check_step(model, Step)
    return functools.partial(train_step, model, live=live, taps=taps)


def _all_reduce(gradients: list) -> list:
    present = [g for g in gradients if g is not None]
    reduced = iter(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [g if g is None else next(reduced) for g in gradients]


@contextlib.contextmanager
def deterministic(wanted: bool):
    """While this lasts, prefer operations that give the same result twice; XLA is not among them."""
    if not wanted or config.is_op_determinism_enabled():
        yield
        return
    config.enable_op_determinism()
    try:
        yield
    finally:
        config.disable_op_determinism()


@functools.cache
def _mirrored() -> tf.distribute.Strategy:
    """One for the process: collective operations of a second one are confused with the first's."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def data_parallel():
    """Where a model is made for all devices of this machine to share its batches."""
    return _mirrored().scope()


def split_cpu(parts: int) -> None:
    """Let the CPU count as several devices; before anything is computed."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * parts)


def device_count() -> int:
    """Devices that share a batch."""
    return _mirrored().num_replicas_in_sync


def sync(model: keras.Model) -> None:
    """Variables are always up to date here."""


def feed(batches: keras.utils.PyDataset) -> tf.data.Dataset:
    """Batches as `fit` and `evaluate` read them, in order and for as many steps as there are now.

    Keras makes the same data set of them, but lets it tune itself, in a thread that does not always hear of the end of
    an epoch: the epoch then waits for it, with TensorFlow 2.21 for almost as long again as it took.
    """
    spec = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batches[0])
    steps = len(batches)
    read = tf.data.Dataset.from_generator(lambda: (batches[step] for step in range(steps)), output_signature=spec)
    options = tf.data.Options()
    options.autotune.enabled = False
    return read.apply(tf.data.experimental.assert_cardinality(steps)).with_options(options)


def scope(model: keras.Model):
    """Where variables beside those of a model are made: its distribution strategy's."""
    return model.distribute_strategy.scope()


def signals(model: keras.Model, taps: dict[str, keras.Layer], compute_loss, reduce):
    """Compile a probe of one model: forward values of the taps, gradients at the taps and at the weights, reduced.

    Args:
        model: any built model.
        taps: name -> layer whose output is observed.
        compute_loss: (x, y, outputs) -> scalar loss; None for a probe without gradients.
        reduce: (activations, weights, gradients, weight_gradients) -> structure of scalars. The first and third map
            tap names to tensors, the others variable paths; the gradients are empty without a loss.

    Returns:
        A function (x, y) -> structure of scalars that leaves every state of the model as it was.
    """
    paths = [v.path for v in model.trainable_variables]
    scale, mode = loss_scale(model), training_mode(model)
    compiled = {}

    # XLA multiplies the time of a convolutional graph on a CPU; the probe stays in the plain graph.
    @tf.function(jit_compile=False)
    def run(x, y, trainable, non_trainable, counters):
        seen = {}

        def see(name, value):
            tape.watch(value)  # behind frozen layers nothing else is
            seen[name] = value
            return value

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            with recording(model, taps, see):
                outputs, _, own = model.stateless_call(trainable, non_trainable, x, return_losses=True, **mode)
            with keras.StatelessScope(loss_state(model, trainable, counters)), own_losses(model, own):
                # Under a strategy Keras' loss is a replica's share; here is one batch, and all of its loss.
                shares = scale * tf.distribute.get_strategy().num_replicas_in_sync
                loss = None if compute_loss is None else compute_loss(x, y, outputs) * shares
        wanted = [seen, dict(zip(paths, trainable, strict=True))]
        if loss is None:
            return reduce(*wanted, {}, {})
        gradients = tape.gradient(loss, wanted, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return reduce(*wanted, *(unscaled(by_name, scale) for by_name in gradients))

    def call(x, y):
        state = [
            [tf.convert_to_tensor(v.value) for v in vs]
            for vs in (model.trainable_variables, model.non_trainable_variables, loss_counters(model))
        ]
        tensors = keras.tree.map_structure(tf.convert_to_tensor, (x, y), none_is_leaf=False)
        arguments = (*tensors, *state)
        # By hand: TensorFlow takes the probes of several models for one that is traced again and again, and warns.
        kind = (*map(len, state), *((*t.shape, t.dtype) for t in keras.tree.flatten(arguments) if t is not None))
        if kind not in compiled:
            compiled[kind] = run.get_concrete_function(*arguments)
        return compiled[kind](*arguments)

    return call


def conv(x, kernel, strides, padding: str, dilation_rate=1):
    """2D convolution, channels last, grouped where the kernel (H, W, in / groups, out) has fewer inputs than x.

    Keras sends a grouped convolution through XLA, which on a CPU is some 29 times slower than this operation. But on a
    CPU the operation has gradients of grouped kernels in float32 and bfloat16 only. One of 1 x 1 is a matrix product,
    whose gradients are up to 4 times faster on small maps, and never much slower.
    """
    grouped = x.shape[-1] != kernel.shape[2]
    if not grouped and tuple(kernel.shape[:2]) == (1, 1) and set(strides) == {1}:
        return tf.tensordot(x, kernel[0, 0], 1)
    if grouped and x.dtype in (tf.float16, tf.float64) and not tf.config.list_physical_devices("GPU"):
        if x.dtype == tf.float64:
            return keras.ops.conv(x, kernel, strides, padding, dilation_rate=dilation_rate)
        wide = conv(tf.cast(x, tf.float32), tf.cast(kernel, tf.float32), strides, padding, dilation_rate)
        return tf.cast(wide, tf.float16)
    return tf.nn.conv2d(x, kernel, strides, padding.upper(), dilations=dilation_rate)


def depthwise_conv(x, kernel, strides, padding: str, dilation_rate):
    """Depthwise convolution, channels last, kernel (H, W, channels, multiplier).

    On a map smaller than the kernel some taps meet nothing but padding, and on a CPU the gradient of the kernel takes
    longer than all else. We leave these taps out: the result is the same, 2 to 10 times sooner.
    """
    if max(strides) > 1 and max(dilation_rate) > 1:  # TensorFlow's operation takes one of the two
        return keras.ops.depthwise_conv(x, kernel, strides, padding, dilation_rate=dilation_rate)
    sides = x.shape[1:3]
    if padding == "same" and set(dilation_rate) == {1} and None not in sides:
        reached = [_reached(*axis) for axis in zip(sides, kernel.shape[:2], strides, strict=True)]
        (top, bottom, rows), (left, right, columns) = reached
        if rows != slice(0, kernel.shape[0]) or columns != slice(0, kernel.shape[1]):
            # Not as the operation's own padding: where a bias follows, TensorFlow 2.21 fuses the two and aborts.
            padded = tf.pad(x, [[0, 0], [top, bottom], [left, right], [0, 0]])
            return tf.nn.depthwise_conv2d(padded, kernel[rows, columns], (1, *strides, 1), "VALID")
    return tf.nn.depthwise_conv2d(x, kernel, (1, *strides, 1), padding.upper(), dilations=dilation_rate)


def _reached(side: int, kernel: int, stride: int) -> tuple[int, int, slice]:
    """Padding before and after, and which taps of the kernel meet the map at all, under "same" padding."""
    last = (-(-side // stride) - 1) * stride  # where the last window starts, less the padding
    before = max(last + kernel - side, 0) // 2
    start, stop = max(before - last, 0), min(side + before, kernel)
    return before - start, max(last + stop - side - before, 0), slice(start, stop)


def standardize_columns(matrix, scale, epsilon: float):
    """scale * (matrix - mean) / sqrt(variance + epsilon) of every column.

    Weight standardization is a batch normalization of the kernel: the fused operation passes over memory half as often.
    """
    return batch_normalize(matrix, scale, tf.zeros_like(scale), epsilon)[0]


def column_moments(matrix):
    """Mean and population variance of every column, and the columns standardized by them (0 where all are equal).

    The fused batch normalization finds all three in the time that separate operations take for the mean alone.
    """
    one = tf.ones(matrix.shape[1], matrix.dtype)
    normal, mean, variance = batch_normalize(matrix, one, tf.zeros_like(one), TINY)
    return mean, variance, normal


def batch_normalize(x, scale, offset, epsilon: float):
    """Normalized over all axes but the last, times a scale, plus an offset; mean and population variance.

    In float32 by one fused operation, which takes a third of the time of separate ones, backwards too.

    Returns:
        Shape of x; (channels,); (channels,), whose gradients are not passed on.
    """
    channels, axes = x.shape[-1], list(range(len(x.shape) - 1))
    if x.dtype != tf.float32 or channels == 1:
        mean, variance = tf.nn.moments(x, axes)
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, epsilon), mean, variance
    normalize = tf.raw_ops.FusedBatchNormV3  # its Python wrapper raises small epsilons
    normal, mean, variance, *_ = normalize(
        x=x if len(x.shape) == 4 else tf.reshape(x, (1, -1, 1, channels)), scale=scale, offset=offset,
        mean=tf.zeros(0), variance=tf.zeros(0), epsilon=epsilon, is_training=True,
    )  # fmt: skip
    rows = tf.cast(tf.size(x) // channels, tf.float32)
    # It tells the unbiased variance; of a single row, 0.
    normal = normal if len(x.shape) == 4 else tf.reshape(normal, tf.shape(x))
    return normal, mean, variance * ((rows - 1) / rows)
