"""What an artefact says of itself: classes, input, preprocessing, metrics, in the place that its format has for it."""

import json
import pathlib
import zipfile

_NAME = "nfzoo.json"


def write(path: pathlib.Path, card: dict) -> None:
    """Store a card in an artefact: metadata of ONNX, a file in a SavedModel's assets.extra or in the archive.

    A .tflite file may have an archive behind it, as LiteRT's own metadata do; a .keras file is one.
    """
    text = json.dumps(card)
    if path.is_dir():
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / _NAME).write_text(text + "\n")
    elif path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"nfzoo": text})
        onnx.save(model, path)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_NAME, text)


def read(path: str | pathlib.Path) -> dict:
    """The card of an artefact; empty if it has none."""
    path = pathlib.Path(path)
    if path.is_dir():
        file = path / "assets.extra" / _NAME
        return json.loads(file.read_text()) if file.exists() else {}
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return json.loads(session.get_modelmeta().custom_metadata_map.get("nfzoo", "{}"))
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(_NAME)) if _NAME in archive.namelist() else {}
