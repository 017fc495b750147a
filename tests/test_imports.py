"""Who may import whom, how long an import takes, and what works without TensorFlow."""

import ast
import itertools
import pathlib
import pkgutil
import re
import statistics
import subprocess
import sys
import time

import pytest

import nfzoo

ROOT = pathlib.Path(nfzoo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def _imports(path):
    """Names a file imports at any depth -> whether at the top level."""
    found = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found[name] = found.get(name, False) or node in tree.body
    return found


def _users(package):
    return {str(path.relative_to(ROOT)) for path in FILES for name in _imports(path) if name.split(".")[0] == package}


def test_frameworks_stay_in_their_files():
    assert _users("tensorflow") <= {"backend/tensorflow.py", "export/formats.py", "export/runtimes.py"}
    assert _users("tensorflow_datasets") <= {"sources.py"}
    assert _users("jax") <= {"backend/jax.py", "engine/folder.py"}
    assert all(path.startswith("plots/") for path in _users("matplotlib"))
    assert all(path.startswith("report/") for path in _users("plotly"))
    assert _users("keras_tuner") == {"tune/plan.py", "tune/workers.py"}


def test_the_architecture_tells_who_imports_whom():
    """The last column of its table names, of every file of the first, the packages and modules that it imports."""
    rows = re.findall(r"^\| (`[^|]+) \| .*? \| ([^|]*) ?\|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    seen = 0
    for files, may in rows:
        if "everything" in may:
            continue
        words = set(re.findall(r"[a-z_]+", may))
        for path in itertools.chain.from_iterable(map(_paths, re.findall(r"`([^`]+(?:py|/))`", files))):
            seen += 1
            package = path.relative_to(ROOT).parts[0].removesuffix(".py")
            imported = {tuple(name.split(".")[1:3]) for name in _imports(path) if name.startswith("nfzoo.")}
            missing = {parts for parts in imported if parts[0] != package and not words & set(parts)}
            assert not missing, (path, missing, may)
    assert seen > 80


def _paths(pattern):
    """Files that a cell names: "a.py", "folder/", "folder/{a,b}.py"."""
    head, _, rest = pattern.partition("{")
    inner, _, tail = rest.partition("}")
    names = [head + name + tail for name in inner.split(",")] if rest else [pattern]
    return [path for name in names for path in ((ROOT / name).rglob("*.py") if name.endswith("/") else [ROOT / name])]


@pytest.mark.parametrize(
    "name",
    [f"{name}.py" for name in ("numerics", "recipes", "settings", "augment", "sources", "fetch", "alarms")]
    + ["models/sites.py", "models/efficientnet.py"]
    + [f"theory/{name}.py" for name in ("__init__", "moments", "pair")]
    + [f"theory/words/{name}.py" for name in ("__init__", "base", "normalized", "free", "residual")]
    + [
        f"plots/{name}.py"
        for name in ("__init__", "animation", "drawing", "figures", "parameters", "select", "style", "training")
    ]
    + [f"report/{name}.py" for name in ("__init__", "contents", "quantities")]
    + [f"tune/{name}.py" for name in ("results", "space")],
)
def test_tables_and_numbers_need_no_keras(name):
    assert "keras" not in {n.split(".")[0] for n in _imports(ROOT / name)}


ALLOWED = {
    "numerics.py": set(),
    "models/sites.py": set(),
    "settings.py": set(),
    "recipes.py": {"settings"},
    "schedules.py": {"recipes"},
    "files.py": set(),
    "plots/style.py": {"files"},
    "plots/select.py": set(),
    "plots/drawing.py": {"plots.select", "plots.style"},
    "plots/figures.py": {"plots", "plots.drawing", "plots.select", "plots.style"},
    "plots/animation.py": {"files", "plots.figures", "plots.select", "plots.style"},
    "plots/training.py": {"plots.style"},
    "plots/parameters.py": {"plots", "plots.drawing", "plots.select", "plots.style"},
    "plots/__init__.py": {
        f"plots.{n}" for n in ("animation", "drawing", "figures", "parameters", "select", "style", "training")
    },
    "theory/pair.py": set(),
    "theory/moments.py": {"numerics", "theory.pair"},
    "theory/words/base.py": {"numerics", "models.sites", "theory.moments"},
    **{
        f"theory/words/{name}.py": {"numerics", "models.sites", "theory.moments", "theory.words.base"}
        for name in ("normalized", "free", "residual")
    },
    "theory/words/__init__.py": {f"theory.words.{name}" for name in ("base", "normalized", "free", "residual")},
    "theory/__init__.py": {"names", "models.sites", "theory.moments", "theory.words"},
    "alarms.py": set(),
    "doctor/checks.py": {"agc", "alarms", "optimizers"},
    "doctor/__init__.py": {"backend.taps", "doctor.checks", "optimizers", "spp", "spp.stats"},
    "report/quantities.py": set(),
    "report/contents.py": {"alarms", "report.quantities", "spp.log"},
    "report/__init__.py": {"alarms", "files", "report", "report.contents", "report.quantities"},
    "layers/registration.py": set(),
    "layers/convolution.py": {"backend", "layers.registration"},
    "layers/activation.py": {"numerics", "layers.registration"},
    "layers/residual.py": {"layers.registration"},
    "layers/inputs.py": {"layers.registration"},
    "agc.py": set(),
    **{f"variants/{n}.py": {"numerics", "layers", "models.sites", "variants.base"} for n in ("free", "residual")},
    "variants/base.py": {"numerics", "layers", "models.sites"},
    "variants/normalized.py": {"layers", "models.sites", "variants.base"},
    "models/blocks.py": {"numerics", "models.sites"},
    **{f"models/{n}.py": {"numerics", "models.sites", "models.blocks"} for n in ("resnet", "nfnet", "regnet")},
    "models/efficientnet.py": {"numerics", "models.sites"},
    "models/ffnn.py": {"models.sites"},
    "optimizers.py": {"agc"},
    "trainer.py": {"agc", "layers", "backend", "optimizers"},
    "backend/tensorflow.py": {"backend.taps"},
    "backend/jax.py": {"backend.taps"},
    "spp/stats.py": {"backend"},
    "spp/taps.py": set(),
    "spp/log.py": {"files"},
    "spp/board.py": set(),
    "spp/reduction.py": {"agc", "optimizers", "spp.stats", "spp.taps"},
    "spp/probe.py": {"backend", "spp.reduction"},
    "spp/live.py": {"backend", "spp.reduction", "spp.stats"},
    "spp/callback.py": {"alarms", "backend", "optimizers", "report", "spp.reduction", "spp.stats"}
    | {f"spp.{n}" for n in ("board", "live", "log", "probe")},
    "sources.py": {"recipes"},
    "data.py": {"augment", "recipes", "files", "sources"},
    "augment.py": {"recipes"},
    "folding/graph.py": {"layers"},
    "folding/rules.py": {"folding.graph"},
    "folding/emit.py": {"layers", "folding.graph"},
    "folding/__init__.py": {"layers"} | {f"folding.{n}" for n in ("emit", "graph", "rules")},
    "memory.py": {"layers"},
    "certify.py": {"backend", "layers", "names", "registry"},
    "export/runtimes.py": set(),
    "export/card.py": set(),
    "export/source.py": {
        "convert",
        "data",
        "engine",
        "export.serve",
        "names",
        "recipes",
        "registry",
        "sources",
        "weights",
    }
    | {"convert.published"},
    "export/onnx_file.py": {"folding.graph", "layers"},
    "export/formats.py": {"export", "export.onnx_file", "folding", "weights"},
    "export/serve.py": {"export", "export.card", "export.runtimes"},
    "export/__init__.py": {"export", "files", "names", "registry", "weights"}
    | {f"export.{n}" for n in ("card", "formats", "runtimes", "serve", "source")},
    "weights.py": {"files"},
    "fetch.py": {"files"},
    "callbacks.py": {"backend", "files", "optimizers"},
    "names.py": {f"models.{n}" for n in ("efficientnet", "ffnn", "nfnet", "regnet", "resnet")} | {"models", "variants"},
    "registry.py": {"names", "models.sites", "variants", "trainer", "weights", "convert", "convert.published"},
    "tune/space.py": {"recipes", "settings"},
    "tune/plan.py": {"tune.space"},
    "tune/results.py": {"recipes", "tune.space"},
    "tune/trials.py": {"callbacks", "engine", "engine.folder", "tune.plan", "tune.space"},
    "tune/workers.py": {"tune", "tune.plan", "tune.space", "tune.trials"},
    "tune/progress.py": {"tune.plan", "tune.trials"},
    "tune/lr_range.py": {"data", "engine", "engine.learning", "recipes"},
    "tune/search.py": {"files", "recipes", "tune"}
    | {f"tune.{n}" for n in ("plan", "progress", "results", "space", "trials", "workers")},
    "tune/__init__.py": {f"tune.{n}" for n in ("lr_range", "results", "search", "space")},
    "tune/__main__.py": {"tune.workers"},
    "convert/pickles.py": set(),
    "convert/torch_file.py": {"convert.pickles"},
    "convert/timm.py": {"convert", "convert.torch_file", "weights"},
    "convert/deepmind.py": {"convert", "convert.pickles"},
    "convert/keras_applications.py": {"weights"},
    "convert/driver.py": {"convert", "files", "names", "registry", "weights"}
    | {f"convert.{n}" for n in ("deepmind", "keras_applications", "timm")},
    "convert/published.py": {"convert", "convert.driver", "fetch", "names", "registry", "weights"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_who_may_import_whom(name):
    ours = set()
    for imported in _imports(ROOT / name):
        if imported.startswith("nfzoo."):
            inner = imported.removeprefix("nfzoo.")
            while inner and not (
                (ROOT / (inner.replace(".", "/") + ".py")).exists() or (ROOT / inner.replace(".", "/")).is_dir()
            ):
                inner = inner.rpartition(".")[0]
            ours.add(inner)
    assert ours - {""} <= ALLOWED[name]


@pytest.mark.slow
def test_every_module_can_be_imported_first(fresh_process):
    """In one process, forgetting nfzoo each time: no module relies on another one having been imported before it."""
    modules = [m.name for m in pkgutil.walk_packages([str(ROOT)], "nfzoo.") if m.name != "nfzoo.backend.jax"]
    code = """
import importlib, json, sys
import keras, rich
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "nfzoo"]:
        del sys.modules[name]
    importlib.import_module(module)
print(json.dumps(len(sys.argv) - 1))
"""
    assert fresh_process(code, *modules) == len(modules) > 30
    fresh_process("import nfzoo.backend.jax, json; print(json.dumps(1))", KERAS_BACKEND="jax")


_PARTS = [part.name for part in pkgutil.iter_modules([str(ROOT)])]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["agc", "optimizers", "backend"], id="three"),
        pytest.param(_PARTS, id="all", marks=pytest.mark.slow),
    ],
)
def test_what_imports_keras_first_registers_our_classes(fresh_process, parts):
    """Each in a process of its own, where it is what imports Keras: `nfzoo.AGC(0.01)` may be a program's first line."""
    code = """
import json, os, sys
import jax, pandas
results = {}
for part in sys.argv[1:]:
    reading, writing = os.pipe()
    if not os.fork():
        __import__(f"nfzoo.{part}")
        keras = sys.modules.get("keras")
        found = keras is None or keras.saving.get_registered_object("nfzoo>NFModel") is not None
        os.write(writing, json.dumps([keras is not None, found]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        results[part] = json.loads(pipe.read() or "[]")
    os.wait()
print(json.dumps(results))
"""
    found = fresh_process(code, *parts, KERAS_BACKEND="jax")
    assert {part for part, [_, registered] in found.items() if registered} == set(parts)
    assert {"agc", "optimizers", "backend"} <= {part for part, [keras, _] in found.items() if keras}


def test_importing_nfzoo_imports_neither_keras_nor_tensorflow(fresh_process):
    code = """
import json, sys
import nfzoo, nfzoo.recipes
nfzoo.list_models(), nfzoo.model_info("bn_efficientnet_b0")
print(json.dumps(sorted(sys.modules)))
"""
    assert not {"keras", "tensorflow", "jax", "matplotlib"} & set(fresh_process(code))


@pytest.mark.slow
def test_nfzoo_adds_little_to_the_import_of_keras(fresh_process):
    code = """
import json, time, keras
began = time.perf_counter()
import nfzoo
nfzoo.NFModel
print(json.dumps(time.perf_counter() - began))
"""
    assert statistics.median(fresh_process(code) for _ in range(3)) < 0.5


def test_list_answers_quickly():
    def seconds():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nfzoo.cli", "list"], check=True, capture_output=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 1.5


_WITHOUT_TENSORFLOW = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


@pytest.mark.slow
def test_everything_but_tensorflow_datasets_works_on_jax_without_tensorflow(tmp_path, fresh_process):
    """Import, build, train with AGC, probe, resume, scan, evaluate, write ONNX; tfds says what to do instead."""
    code = (
        _WITHOUT_TENSORFLOW
        + """
import json, warnings
warnings.simplefilter("ignore")
import keras
import numpy as np
from rich.console import Console
import nfzoo
from nfzoo import data, engine, export, recipes, spp, tune
recipe = recipes.override(recipes.get("demo"), {"data.name": "fake", "epochs": 2, "batch_size": 64, "data.limit": 128})
quiet = Console(quiet=True)
out = sys.argv[1]
metrics = engine.run("nf_test_efficientnet", recipe, out + "/run", console=quiet)
log = spp.read(out + "/run")
exported = export.export(out + "/run", out + "/run.onnx")["largest_relative_difference"]
scan = tune.scan(["sn_test_ffnn"], [0.1, 0.01], recipe, out + "/scan", seeds=[0], console=quiet)
try:
    data.load(recipes.Data(name="cifar100"))
except ImportError as error:
    advice = str(error)
keras.utils.set_random_seed(0)
images = data.load(recipe.data)
x, y = data.Batches(images.train, 16, images.mean, images.std)[0]
weights = []
for probed in (False, True):
    keras.utils.set_random_seed(0)
    model = nfzoo.build("nf_test_efficientnet", classes=4, dropout_rate=0.5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, agc=nfzoo.AGC(0.1))
    probe = nfzoo.SignalPropagation(x, y, every=1)
    model.fit(x, y, batch_size=4, verbose=0, shuffle=False, callbacks=[probe] if probed else [])
    weights.append([np.asarray(w) for w in model.get_weights()])
untouched = all((a == b).all() for a, b in zip(*weights)) and probe.table().step.nunique() == 5
print(json.dumps([
    untouched, metrics["status"], sorted(log.kind.unique()), log.step.unique().tolist(), len(scan), advice,
    engine.evaluate(out + "/run")["images"], "tensorflow" in sys.modules, exported,
]))
"""
    )
    result = fresh_process(code, tmp_path, KERAS_BACKEND="jax")
    untouched, status, kinds, steps, trials, advice, images, loaded, exported = result
    assert untouched  # probing between the steps of an epoch, where JAX keeps the state out of the model
    assert (status, steps, trials, images, loaded) == ("complete", [0, 2, 4], 2, 64, False)
    assert exported < 1e-4
    assert kinds == ["activation", "effective_weight", "gradient", "weight", "weight_gradient"]
    assert "nfzoo data" in advice and ".npz" in advice


_MEASURE = """
import json, sys, os
import numpy as np
import keras
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
import nfzoo
name = sys.argv[1]
model = nfzoo.build(name, dropout_rate=0.0)
rng = np.random.default_rng(0)
for v in model.weights:
    std = np.sqrt(1 / np.prod(v.shape[:-1]))
    v.assign(rng.uniform(0.5, 1.5, v.shape) if len(v.shape) < 2 else std * rng.standard_normal(v.shape))
x, y = rng.standard_normal((8, 32, 32, 3)), np.arange(8) % 10
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rows = nfzoo.spp.snapshot(model, x, y, loss, taps="layers")
model.compile(keras.optimizers.SGD(1.0), loss, agc=nfzoo.AGC(0.02, log_clipped=True))
logs = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
sums = {v.path: [float(np.sum(np.array(v))), float(np.sum(np.square(np.array(v))))] for v in model.weights}
print(json.dumps([rows.to_dict("list"), logs, sums]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf_test_efficientnet", "bn_test_efficientnet", "nf_test_resnet"])
def test_tensorflow_and_jax_agree_in_float64(name, fresh_process):
    """The same statistics, the same gradients at taps and weights, and the same clipped training steps."""
    rows, logs, sums = fresh_process(_MEASURE, name, KERAS_BACKEND="tensorflow")
    rows2, logs2, sums2 = fresh_process(_MEASURE, name, KERAS_BACKEND="jax", JAX_ENABLE_X64="1")
    assert rows["layer"] == rows2["layer"] and rows["kind"] == rows2["kind"]
    for stat in ("acsm", "acv", "second_moment"):
        # Keras' mean rounds to float32 on JAX even here, so that a mean that must be zero is 1e-7 of its terms.
        assert rows2[stat] == pytest.approx(rows[stat], rel=1e-4, abs=1e-12)
    assert 0 < logs["agc_clipped"][0] < 1
    assert logs2["agc_clipped"] == pytest.approx(logs["agc_clipped"], abs=1e-6)
    assert logs2["loss"] == pytest.approx(logs["loss"], rel=1e-6)
    for path, value in sums.items():
        assert sums2[path] == pytest.approx(value, rel=1e-5, abs=1e-8), path
