"""What takes part in training/benchmark.py: each contestant is a function that makes a function of one step.

    python training/contestants.py '{"size": 32, …}' nfzoo:nf_efficientnet_b0

is the process of one of them: it builds, warms up, then for every number that it reads does so many steps and prints
the seconds of one; for "peak" it prints the largest memory that the process had, in MB.
"""

import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np


def _compiled(model):
    import keras

    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _nfzoo_model(name: str, case, images):
    import nfzoo

    return _compiled(nfzoo.build(name, classes=case.classes, input_shape=images.shape[1:], **case.options))


def nfzoo_step(name: str, case, images, labels):
    model = _nfzoo_model(name, case, images)
    return lambda: model.train_on_batch(images, labels)


def probe_step(name: str, case, images, labels):
    """One measurement with the callback's default settings."""
    return _probe(name, case, images, labels)


def full_probe_step(name: str, case, images, labels):
    """One measurement of all layers, all statistics, all kinds."""
    from nfzoo import spp

    return _probe(name, case, images, labels, taps="layers", statistics="all", what=spp.WHAT)


def _probe(name: str, case, images, labels, **options):
    from nfzoo import spp

    model = _nfzoo_model(name, case, images)
    probe = spp.Probe(model, loss=model.loss, **options)
    return lambda: probe(images, labels)


def live_step(name: str, case, images, labels):
    """A training step that keeps the statistics of its own tensors, default settings."""
    from nfzoo import spp

    model = _nfzoo_model(name, case, images)
    spp.SignalPropagation(source="live").set_model(model)
    return lambda: model.train_on_batch(images, labels)


def batches_step(name: str, case, images, labels):
    """One shuffled batch of 8-bit images, augmented and standardized as a recipe says; no network."""
    from nfzoo import data, recipes

    recipe = recipes.override(recipes.get(name), {"batch_size": case.batch})
    rng, n = np.random.default_rng(0), 100 * case.batch
    split = data.Split(
        rng.integers(0, 256, (n, case.size, case.size, 3), np.uint8), rng.integers(0, case.classes, n).astype("int32")
    )
    none, classes = split.take(slice(0)), tuple(map(str, range(case.classes)))
    stream = data.pipeline(data.Images(split, none, none, classes, (0.5,) * 3, (0.25,) * 3, "noise"), recipe)["train"]
    steps = itertools.cycle(range(len(stream)))
    return lambda: stream[next(steps)]


def keras_step(name: str, case, images, labels):
    import keras

    options = {"weights": None, "classes": case.classes, "classifier_activation": None}
    model = getattr(keras.applications, name)(input_shape=images.shape[1:], **options)
    _compiled(model)
    return lambda: model.train_on_batch(images, labels)


def kecam_step(name: str, case, images, labels):
    """keras_cv_attention_models: the last Keras of TensorFlow's own."""
    model = _kecam(name, case, images)  # which chooses the Keras of the process

    import tf_keras

    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return lambda: model.train_on_batch(images, labels)


def _kecam(name: str, case, images):
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    family, model = name.split(".")
    options = {"pretrained": None, "num_classes": case.classes, "classifier_activation": None}
    found = importlib.import_module(f"keras_cv_attention_models.{family}")
    return getattr(found, model)(input_shape=images.shape[1:], **options)


def agc_step(name: str, case, images, labels):
    """A training step that clips adaptively."""
    import nfzoo

    model = _nfzoo_model(name, case, images)
    model.compile(model.optimizer, model.loss, agc=nfzoo.AGC(0.01))
    return lambda: model.train_on_batch(images, labels)


# ---------------------------------------------------------------- training, on a GPU where there is one
def jax_step(name: str, case, images, labels):
    """A training step on JAX; the images are on the device before."""
    import jax
    import keras

    keras.config.set_dtype_policy("float32" if case.precision == "float32" else f"mixed_{case.precision}")
    model, x, y = _nfzoo_model(name, case, images), jax.device_put(images), jax.device_put(labels)
    return lambda: model.train_on_batch(x, y)


def timm_compiled_step(name: str, case, images, labels):
    import torch

    return timm_step(name, case, images, labels, torch.compile)


def timm_step(name: str, case, images, labels, prepared=lambda model: model):
    import timm
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(name, num_classes=case.classes).to(device, memory_format=torch.channels_last).train()
    optimizer, call = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), prepared(model)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long().to(device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=case.precision == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()  # Keras reports the loss of every step, too

    return step


# ---------------------------------------------------------------- inference
def _inferring(model, images):
    """Keras' `predict` takes a millisecond for itself; a compiled call is what a server would have."""
    import tensorflow as tf

    call, x = tf.function(lambda x: model(x, training=False), jit_compile=False), tf.constant(images)
    return lambda: call(x).numpy()


def kecam_infer(name: str, case, images, labels):
    return _inferring(_kecam(name, case, images), images)


def _built(name: str, case, images):
    import nfzoo

    return nfzoo.build(name, classes=case.classes, input_shape=images.shape[1:], **case.options)


def infer(name: str, case, images, labels):
    """As it was trained."""
    return _inferring(_built(name, case, images), images)


def folded(name: str, case, images, labels):
    """What is constant is folded into kernels; grouped convolutions are nfzoo's."""
    import nfzoo

    return _inferring(nfzoo.fold(_built(name, case, images), portable=False), images)


def portable(name: str, case, images, labels):
    """Folded to Keras' own layers."""
    import nfzoo

    return _inferring(nfzoo.fold(_built(name, case, images)), images)


def _exported(ending: str):
    def artefact(name: str, case, images, labels):
        from nfzoo.export import export, runtimes

        path = pathlib.Path(tempfile.mkdtemp()) / f"model{ending}"
        export(_built(name, case, images), path, images=images)
        run, _ = runtimes.load(path)
        return lambda: run(images)

    return artefact


def keras_infer(name: str, case, images, labels):
    import keras

    options = {"weights": None, "classes": case.classes, "classifier_activation": None}
    return _inferring(getattr(keras.applications, name)(input_shape=images.shape[1:], **options), images)


def timm_infer(name: str, case, images, labels):
    import timm
    import torch

    model = timm.create_model(name, num_classes=case.classes).to(memory_format=torch.channels_last).eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def step():
        with torch.inference_mode():
            return model(x).numpy()

    return step


# ---------------------------------------------------------------- beginnings
def imported(name: str, case, images, labels):
    """A new Python that imports a package and ends."""
    return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True, capture_output=True)


def build(name: str, case, images, labels):
    return lambda: _built(name, case, images)


def keras_build(name: str, case, images, labels):
    import keras

    return lambda: getattr(keras.applications, name)(input_shape=images.shape[1:], weights=None, classes=case.classes)


def kecam_build(name: str, case, images, labels):
    return lambda: _kecam(name, case, images)


CONTESTANTS = {
    "nfzoo": nfzoo_step, "probe": probe_step, "full_probe": full_probe_step, "live": live_step, "agc": agc_step,
    "batches": batches_step, "keras.applications": keras_step, "jax": jax_step,
    "timm": timm_step, "timm_compiled": timm_compiled_step,
    "infer": infer, "folded": folded, "portable": portable, "saved_model": _exported(""),
    "litert": _exported(".tflite"), "onnx": _exported(".onnx"), "keras_infer": keras_infer, "timm_infer": timm_infer,
    "kecam": kecam_step, "kecam_infer": kecam_infer, "import": imported, "build": build, "keras_build": keras_build,
    "kecam_build": kecam_build,
}  # fmt: skip
# Beside what nfzoo needs.
PACKAGES = {
    "litert": ("ai_edge_litert",), "onnx": ("onnx", "onnxruntime"), "jax": ("jax",),
    **dict.fromkeys(("timm", "timm_infer", "timm_compiled"), ("torch", "timm")),
    **dict.fromkeys(("kecam", "kecam_infer", "kecam_build"), ("keras_cv_attention_models", "tf_keras")),
}  # fmt: skip

# Of their processes. On a GPU JAX would take three quarters of the memory, and leave the others none.
ENVIRONMENTS = {"jax": {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}


def peak_mb() -> float:
    """The most memory of a GPU that this process had, or where it uses none, of the machine (Linux)."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    if "jax" in sys.modules and (statistics := sys.modules["jax"].devices()[0].memory_stats()):
        return statistics["peak_bytes_in_use"] / 2**20
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def step_of(case, contestant: str) -> Callable[[], object]:
    """A function of one step, not yet called."""
    kind, name = contestant.split(":")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case.batch, case.size, case.size, 3)).astype("float32")
    return CONTESTANTS[kind](name, case, images, rng.integers(0, case.classes, case.batch))


def main(case: str, contestant: str) -> None:
    began = time.perf_counter()
    step = step_of(SimpleNamespace(**json.loads(case)), contestant)
    built = time.perf_counter() - began
    for _ in range(3):
        step()
    print(json.dumps(built), flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":  # an import's is its own process'
            print(json.dumps(float("nan") if contestant.startswith("import:") else peak_mb()), flush=True)
            continue
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps((time.perf_counter() - began) / int(line)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
