"""Run an artefact with its own runtime. Imports nothing of nfzoo, which must not be needed to serve a model.

    python runtimes.py PATH INPUTS.npy OUTPUTS.npy

prints the latency of one image and the throughput of the batch as JSON.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def saved_model(path: str) -> tuple[Run, dict]:
    """A TensorFlow SavedModel."""
    import tensorflow as tf

    model = tf.saved_model.load(path)
    signature = model.signatures["serving_default"]
    described = {
        "inputs": {
            name: _described(t.shape, t.dtype.name) for name, t in signature.structured_input_signature[1].items()
        },
        "outputs": {name: _described(t.shape, t.dtype.name) for name, t in signature.structured_outputs.items()},
    }
    return lambda x: model.serve(x).numpy(), described


def litert(path: str) -> tuple[Run, dict]:
    """A LiteRT (.tflite) model."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != x.shape:
            interpreter.resize_tensor_input(given["index"], x.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    interpreter.allocate_tensors()
    described = {
        kind: {one["name"]: _described(one["shape_signature"], np.dtype(one["dtype"]).name)}
        for kind, one in (("inputs", given), ("outputs", result))
    }
    return run, described


def onnx(path: str) -> tuple[Run, dict]:
    """An ONNX model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = {
        kind: {one.name: _described(one.shape, one.type) for one in found}
        for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x})[0], described


def keras(path: str) -> tuple[Run, dict]:
    """A Keras model (.keras) of Keras' own layers."""
    sys.modules.setdefault("nfzoo", None)  # an import of it fails
    import keras

    model = keras.saving.load_model(path, compile=False)
    described = {
        kind: {one.name: _described(one.shape, one.dtype) for one in found}
        for kind, found in (("inputs", model.inputs), ("outputs", model.outputs))
    }
    return lambda x: np.asarray(model.predict_on_batch(x)), described  # `predict` sets up an epoch for each call


RUNTIMES = {"": saved_model, ".tflite": litert, ".onnx": onnx, ".keras": keras}


def load(path: str | pathlib.Path) -> tuple[Run, dict]:
    """A function of a batch, and what it takes and gives.

    Raises:
        ValueError: for another kind of file.
    """
    path = pathlib.Path(path)
    kind = "" if path.is_dir() else path.suffix
    wanted = "Expected a SavedModel's folder, a .tflite, .onnx or .keras file"
    if not path.exists():
        raise ValueError(f"{wanted}. Received: {path}, which does not exist")
    if kind not in RUNTIMES:
        raise ValueError(f"{wanted}. Received: {path}")
    try:
        return RUNTIMES[kind](str(path))
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own for a damaged file
        text = " ".join(str(error).split())
        raise ValueError(f"{wanted}, whole. Received: {path}, which its runtime does not load: {text[:300]}") from error


def _described(shape, dtype: str) -> dict:
    sides = (None if side is None or isinstance(side, str) or side < 0 else int(side) for side in shape)
    return {"shape": list(sides), "dtype": dtype}


def timed(run: Run, x: np.ndarray, seconds: float = 1.0) -> float:
    """Median time of a call, seconds: at least five calls, as many as fit."""
    run(x)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 100):
        began = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(path: str, inputs: str, outputs: str) -> None:
    run, _ = load(path)
    x = np.load(inputs)
    np.save(outputs, run(x))
    print(json.dumps({"latency_ms": 1000 * timed(run, x[:1]), "images_per_second": len(x) / timed(run, x)}))
    assert sys.modules.get("nfzoo") is None


if __name__ == "__main__":
    main(*sys.argv[1:])
