"""The command line: each command does its job, each mistake is one clear line and a non-zero exit."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tensorflow as tf
from conftest import same
from PIL import Image

import nfzoo
from nfzoo import cli, data, recipes
from nfzoo.cli.signals import _patient

TINY = ["--data", "fake", "--set", "data.limit=64", "--set", "batch_size=64"]


def _run(*args, **kwargs):
    env = {**os.environ, "NFZOO_TRACEBACK": ""}
    command = [sys.executable, "-m", "nfzoo.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **kwargs)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process; return exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["nfzoo", *map(str, args)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    # The terminal of this process is pytest's.
    monkeypatch.setattr(cli.console, "_width", 200)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    process = _run("train", "sn_test_ffnn", *TINY, "--epochs", 1, "--out", out)
    assert process.returncode == 0, process.stderr
    return out, process


def test_train_prints_progress_and_the_result_and_nothing_else(trained):
    out, process = trained
    assert "epoch 1/1" in process.stdout and '"status": "complete"' in process.stdout
    assert process.stderr == ""
    assert (out / "metrics.json").exists() and (out / "spp.jsonl").exists()


def test_eval(trained, call):
    status, out, _ = call("eval", trained[0])
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    assert status == 0 and json.loads(out)["accuracy"] == pytest.approx(metrics["test_accuracy"])


def test_spp_of_runs_and_of_names(trained, call, tmp_path):
    status, out, _ = call("spp", trained[0], "bn_test_ffnn", "--data", "fake", "--to", tmp_path / "a.png")
    assert status == 0 and "wrote" in out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height / 2 > 200


def test_export_and_serve_check(trained, call, tmp_path):
    to, picture = tmp_path / "zoo" / "nf.onnx", tmp_path / "picture.png"
    Image.new("RGB", (40, 50), (200, 30, 30)).save(picture)
    status, out, _ = call("export", trained[0], "--to", to, "--preprocess")
    assert status == 0 and "compared on real images" in out and "images/s in a batch" in out
    assert json.loads((tmp_path / "zoo" / "manifest.json").read_text())["nf.onnx"]["format"] == "onnx"
    status, out, _ = call("serve-check", to, "--image", picture, "--top", 3)
    assert status == 0 and "float" in out and "ms for one image" in out
    assert len(re.findall(r"\d+\.\d%", out)) == 3


def test_scan(call, tmp_path):
    grid = ("sn_test_ffnn", "--lr", "0.1,0.001", "--clip-factor", "0.02", "--axis", "augment.flip=true", "--seeds", "0")
    status, out, _ = call("scan", *grid, *TINY, "--epochs", 1, "--out", tmp_path)
    assert status == 0 and "mean ± std" in out
    results = pd.read_csv(tmp_path / "scan.csv")
    assert len(results) == 2 and (tmp_path / "scan.png").exists()
    best = results.loc[results.val_accuracy.idxmax()]
    trial = tmp_path / f"sn_test_ffnn-lr{best.learning_rate:g}-clip0.02-flipTrue-seed0"
    command = shlex.split(next(line for line in out.splitlines() if line.startswith("nfzoo train")))
    resolved = json.loads(call(*command[1:], "--dry-run")[1])
    ran = json.loads((trial / "options.json").read_text())
    assert all(resolved[key] == ran[key] for key in ("model", "build", "recipe", "fingerprint"))


def test_a_scan_of_another_axis_is_drawn_along_it(call, tmp_path):
    status, out, _ = call("scan", "sn_test_ffnn", "--clip-factor", "0.01,0.1", *TINY, "--epochs", 1, "--seeds", "0",
                          "--out", tmp_path)  # fmt: skip
    assert status == 0 and "nfzoo train sn_test_ffnn" in out and (tmp_path / "scan.png").exists()


def test_learning_rates_are_scanned_unless_another_axis_is_asked_for(call):
    """A question on clip factors keeps the rate of the recipe."""
    planned = lambda *options: json.loads(call("scan", "sn_test_ffnn", *TINY, *options, "--dry-run")[1])  # noqa: E731
    assert planned()["axes"] == {"optimizer.learning_rate": [0.1, 0.01, 0.001]}
    assert planned("--clip-factor", "0.02,0.04")["axes"] == {"agc.clip_factor": [0.02, 0.04]}
    assert len(planned("--axis", "batch_size=8,16", "--lr", "0.1")["axes"]) == 2


def test_lr_find(call, tmp_path):
    arguments = (
        "sn_test_ffnn",
        "--data",
        "fake",
        "--batch-size",
        16,
        "--to",
        100,
        "--steps",
        30,
        "--out",
        tmp_path / "a",
    )
    assert json.loads(call("lr-find", *arguments, "--dry-run")[1])["steps"] == 30 and not (tmp_path / "a").exists()
    status, out, _ = call("lr-find", *arguments)
    assert status == 0 and len(re.findall(r"--lr \d", out)) == 2
    table = pd.read_csv(tmp_path / "a" / "lr_find.csv")
    assert list(table) == ["step", "learning_rate", "loss", "smoothed"] and (tmp_path / "a" / "lr_find.png").exists()


def test_list_and_info(call):
    status, out, _ = call("list", "sn_*b0")
    assert status == 0 and "sn_efficientnet_b0" in out and "5,246,532" in out
    filters = ("--variant", "gn", "--family", "efficientnet")
    assert [m["name"] for m in json.loads(call("list", *filters, "--json")[1])][:1] == ["gn_efficientnet_b0"]
    assert json.loads(call("info", "bn_efficientnet_b0", "--json")[1])["batch_independent"] is False
    assert "No model matches" in call("list", "xyz*")[1]


def test_info_agc_prints_every_variable_with_axes_and_factor(call):
    rows = json.loads(call("info", "nf_test_efficientnet", "--agc", "--factor", "0.02", "--json")[1])
    by_name = {row["variable"]: row for row in rows}
    assert by_name["stage2_block1_conv2/kernel"]["axes"] == [0, 1]
    assert by_name["head/kernel"] == {"variable": "head/kernel", "shape": [64, 10], "axes": None, "factor": None}
    assert by_name["stem_conv1/kernel"]["factor"] == 0.02
    assert "not clipped" in call("info", "nf_test_efficientnet", "--agc")[1]


def test_data_writes_arrays(call, tmp_path):
    status, out, _ = call("data", "fake", "--to", tmp_path / "fake.npz")
    assert status == 0 and "--data" in out
    resolved = call("train", "sn_test_ffnn", "--data", tmp_path / "fake.npz", "--dry-run")[1]
    assert json.loads(resolved)["recipe"]["data"]["name"].endswith("fake.npz")


def test_convert(call, tiny_timm, tmp_path):
    """From timm's layout to ours, to a whole model, and back again."""
    source, ours, whole, back = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.keras", "d.safetensors")
    )
    model, tensors = tiny_timm
    safetensors.numpy.save_file(tensors, source)
    given = ("convert", "timm", source, "--model", "test_nfnet", "--build", "input_shape=[64, 64, 3]", "--to")
    for to in (ours, whole):
        status, out, _ = call(*given, to)
        assert status == 0 and f"read {len(model.weights)} weights, {model.count_params():,} parameters" in out
        assert f"wrote {to} (" in out.replace("\n", "")
        same_options = {"dialect": "timm", "classes": 3, "input_shape": (64, 64, 3)}
        assert same(nfzoo.build("test_nfnet", weights=to, **same_options), model)
    assert call(*given, back, "--target", "timm")[0] == 0
    written = safetensors.numpy.load_file(back)
    assert written.keys() == tensors.keys() and all((written[key] == tensors[key]).all() for key in tensors)
    assert sorted(tmp_path.iterdir()) == [source, ours, whole, back]


def test_brackets_in_paths_are_printed(call, tmp_path):
    folder = tmp_path / "[red]x[/]" / "[/bold]"
    assert f"wrote {folder / 'a.npz'} (" in call("data", "fake", "--to", folder / "a.npz")[1].replace("\n", "")
    for said in ("epoch 1/1", f"{folder / 'run'}: complete already"):
        status, out, _ = call("train", "sn_test_ffnn", *TINY, "--epochs", 1, "--taps", "none", "--out", folder / "run")
        assert status == 0 and said in out.replace("\n", "")
    assert "No model matches '[red]x'." in call("list", "[red]x")[1]


def test_dry_run_resolves_and_writes_nothing(call, tmp_path):
    status, out, _ = call(
        "train", "bn_efficientnet_b0", "--recipe", "poster", "--lr", "0.01", "--seed", "67", "--set", "agc=0.02",
        "--build", "stem=small", "--out", tmp_path / "run", "--dry-run",
    )  # fmt: skip
    resolved = json.loads(out)
    assert status == 0 and not (tmp_path / "run").exists()
    assert resolved["recipe"]["optimizer"]["learning_rate"] == 0.01 and resolved["recipe"]["seed"] == 67
    assert resolved["recipe"]["agc"]["clip_factor"] == 0.02
    assert resolved["build"] == {
        "padding": "symmetric", "dropout_rate": 0.2, "epsilon": 1e-5, "momentum": 0.9, "init": "poster",
        "stem": "small",
    }  # fmt: skip
    scan = json.loads(call("scan", "bn_test_ffnn", "--dry-run", "--out", tmp_path / "scan")[1])
    assert scan["trials"] == 9 and not (tmp_path / "scan").exists()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "eval",
        "spp",
        "scan",
        "lr-find",
        "export",
        "serve-check",
        "certify",
        "list",
        "info",
        "data",
        "convert",
    ],
)
def test_help(command, call):
    status, out, _ = call(*command.split(), "--help")
    assert status == 0 and "Usage" in out


@pytest.fixture
def folder_of_two_sizes(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    for name, side in (("ants", 32), ("bees", 40)):
        (root / name).mkdir()
        for i in range(5):
            Image.new("RGB", (side, 32), (40 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("command", "to"), [(["data"], "a.npz"), (["spp", "sn_test_ffnn", "--data"], "a.png")])
def test_what_is_advised_for_images_of_several_sizes_works(command, to, folder_of_two_sizes, call, tmp_path):
    command = [*command, folder_of_two_sizes, "--to", tmp_path / to]
    status, _, err = call(*command)
    assert status == 1 and "--set data.image_size=160 of train and scan" in err
    assert call(*command, *re.search("--image-size 160", err)[0].split())[0] == 0 and (tmp_path / to).exists()


MISTAKES = {
    "unknown model": (["train", "sn_efficientnet_b00"], "sn_efficientnet_b0"),
    "inadmissible variant": (["train", "eun_ffnn_10x512"], "none, bn, sn"),
    "wrong keyword": (["train", "sn_test_ffnn", "--build", "momentun=0.9"], "momentun"),
    "unknown variant of list": (["list", "--variant", "zz"], "none, bn, gn, sn, nf"),
    "unknown family of list": (["list", "--family", "zz"], "efficientnet, resnet, nfnet, regnet, ffnn"),
    "not a probability": (
        ["train", "sn_test_ffnn", "--build", "dropout_rate=-1", "--dry-run"],
        "dropout_rate in [0, 1)",
    ),
    "unknown recipe": (["train", "sn_test_ffnn", "--recipe", "nfnett"], "poster, demo"),
    "unknown setting": (["train", "sn_test_ffnn", "--set", "optimizer.lr=1"], "learning_rate"),
    "not a setting": (["train", "sn_test_ffnn", "--set", "epochs"], "KEY=VALUE"),
    "missing data": (["train", "sn_test_ffnn", "--data", "no_such_set"], "digits, fake"),
    "missing file": (["train", "sn_test_ffnn", "--data", "none.npz"], "nfzoo data"),
    "learning rates": (["scan", "sn_test_ffnn", "--lr", "0.1;0.2"], "0.1;0.2"),
    "range": (["scan", "sn_test_ffnn", "--lr", "1e-1..1e-4"], "LOW..HIGH"),
    "axis": (["scan", "sn_test_ffnn", "--axis", "epoch=1,2"], "Did you mean 'epochs'?"),
    "search": (["scan", "sn_test_ffnn", "--search", "genetic"], "grid, random, bayesian, hyperband"),
    "sweep": (["lr-find", "sn_test_ffnn", "--data", "fake", "--from", "1", "--to", "0.1"], "start < end"),
    "not a run": (["eval", "."], "options.json"),
    "not a run to export": (["export", ".", "--to", "x"], "options.json"),
    "an unknown format": (["export", "sn_test_ffnn", "--to", "x", "--format", "tf"], "saved_model, litert, onnx"),
    "no artefact": (["serve-check", "nothing.onnx"], "a .tflite, .onnx or .keras file"),
    "no log": (["spp", ".", "--to", "x.png"], "spp.jsonl"),
    "input too small": (["train", "sn_efficientnet_b0", "--data", "fake", "--set", "data.image_size=16"], "32x32"),
    "no such source": (
        ["convert", "torch", "a.pth", "--model", "nf_resnet50", "--to", "b.keras"],
        "timm, deepmind, keras",
    ),
    "no such file": (["convert", "timm", "a.pth", "--model", "nf_resnet50", "--to", "b.keras"], "a.pth"),
    "no such form": (["convert", "timm", "a.pth", "--model", "nf_resnet50", "--to", "b.h5"], "OUT.safetensors"),
    "a form that timm lacks": (
        ["convert", "timm", "a.pth", "--model", "nf_resnet50", "--to", "b.keras", "--target", "timm"],
        "b.keras of target timm",
    ),
    "no such place": (["train", "sn_test_ffnn", "--data", "fake", "--out", "/proc/no/place"], "/proc/no"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_a_status(mistake, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[mistake]
    status, _, err = call(*arguments)
    assert status == 1 and err.startswith("error: ") and expected in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def _raise(error):
    raise error


TRACE = 'Graph execution error:\n\nDetected at node loss defined at:\n  File "a.py", line 1\n\n'


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Keras says\n\nin several lines"), "error: Keras says in several lines"),
        (KeyError("stage9"), "Unexpected error: KeyError: 'stage9'; set NFZOO_TRACEBACK=1 to see where"),
        (
            tf.errors.InvalidArgumentError(None, None, f"{TRACE}A label of 99\n\t [[{{{{node loss}}}}]]"),
            "Unexpected error: InvalidArgumentError: A label of 99; set NFZOO_TRACEBACK=1 to see where",
        ),
        (
            tf.errors.ResourceExhaustedError(None, None, f"{TRACE}OOM when…"),
            "error: Out of memory. Try smaller images, or a smaller batch",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "error: Out of memory. Try smaller images",
        ),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(error, expected, call, monkeypatch):
    from nfzoo import names

    monkeypatch.setattr(names, "list_models", lambda *args, **kwargs: _raise(error))
    status, _, err = call("list")
    assert status == 1 and err.startswith(expected) and len(err.strip().splitlines()) == 1
    monkeypatch.setenv("NFZOO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        call("list")


def test_divergence_is_said_and_is_a_status(call, tmp_path):
    settings = [*TINY, "--set", "optimizer.name=sgd", "--set", "agc=none", "--lr", "1e9"]
    status, out, err = call("train", "none_test_ffnn", *settings, "--out", tmp_path / "run")
    assert status == 1 and "not finite" in err and '"status": "diverged"' in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "diverged"


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_same_command_resumes(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "nfzoo.cli", "train", "sn_test_ffnn", *TINY, "--epochs", "4000", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("model-*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes" in err
    options = json.loads((out / "options.json").read_text())
    epoch = max(int(p.stem.split("-")[1]) for p in (out / "checkpoints").glob("model-*.keras"))
    options["recipe"]["epochs"] = epoch + 1
    pathlib.Path(out / "options.json").write_text(json.dumps(options))
    again = _run("train", "sn_test_ffnn", *TINY, "--epochs", epoch + 1, "--out", out)
    assert again.returncode == 0 and f"after epoch {epoch}" in again.stdout


def test_the_doctor_speaks_and_writes_a_report(call, tmp_path):
    out = tmp_path / "report.html"
    status, text, _ = call("doctor", "bn_test_ffnn", "--data", "fake", "--steps", 3, "--batch-size", 8, "--report", out)
    assert status == 0 and "normalize over the batch" in text and out.stat().st_size > 1e6
    status, text, _ = call("doctor", "sn_test_ffnn", "--data", "fake", "--steps", 3, "--json")
    findings = json.loads(text)
    assert status == 0 and {"severity", "check", "sentence", "remedy"} == set(findings[0])
    assert any("No layer normalizes over the batch" in finding["sentence"] for finding in findings)


def test_the_doctor_sees_the_network_and_the_optimizer_that_train_would_have():
    """The recipe's overrides, its schedule by the real number of steps, its smoothed labels and its precision."""
    changes = {"data.name": "fake", "label_smoothing": 0.1, "precision": "mixed_bfloat16", "epochs": 10}
    changes |= {"schedule.warmup_epochs": 1, "build": {"bn_*": {"momentum": 0.7}}, "batch_size": 32}
    recipe = recipes.override(recipes.get("demo"), changes)
    net, x, y = _patient("bn_test_efficientnet", recipe, {"stem": "small"}, steps=2)
    norm, conv = net.get_layer("stem_norm1"), net.get_layer("stem_conv1")
    assert norm.momentum == 0.7 and conv.strides == (1, 1) and conv.compute_dtype == "bfloat16"
    assert x.shape == (64, 32, 32, 3) and y.shape == (64, 4) and net.loss.label_smoothing == 0.1
    steps = len(data.load(recipe.data, recipe.seed).train) / 32
    rate = net.optimizer._learning_rate
    assert steps > 2 and float(rate(1)) == pytest.approx(recipe.peak_learning_rate / np.ceil(steps))
    assert net.agc is not None and keras.config.dtype_policy().name == "float32"


def test_the_doctor_takes_a_saved_network_of_anybody(call, tmp_path):
    image = keras.Input((32, 32, 3))
    x = keras.layers.DepthwiseConv2D(3, depthwise_initializer="lecun_normal", name="thin")(
        keras.layers.Conv2D(8, 3)(image)
    )
    net = keras.Model(image, keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(x)), name="mine")
    net.save(tmp_path / "mine.keras")
    status, text, _ = call("doctor", tmp_path / "mine.keras", "--data", "fake", "--steps", 2, "--batch-size", 8)
    assert status == 0 and "divides the variance by the number of channels" in text and "thin/kernel" in text
    ours = nfzoo.build("sn_test_ffnn", classes=4, input_shape=(32, 32, 3))
    ours.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))  # of labels as vectors
    ours.save(tmp_path / "vectors.keras")
    status, _, err = call("doctor", tmp_path / "vectors.keras", "--data", "fake", "--steps", 2, "--batch-size", 8)
    assert status == 0, err


STRANGERS = ["keras.applications:ResNet5000", "keras.applications:resnet50", "sn_efficientnet_b99", "missing.keras"]


@pytest.mark.parametrize("name", STRANGERS)
def test_the_doctor_does_not_know_everybody(call, name):
    status, _, err = call("doctor", name, "--data", "fake")
    assert status == 1 and ("Expected" in err or "not found" in err) and name.split(":")[-1].split(".")[0] in err


def test_report_of_a_run(call, trained, tmp_path):
    status, text, _ = call("report", trained[0], "--out", tmp_path / "a" / "report.html")
    page = (tmp_path / "a" / "report.html").read_text()
    assert status == 0 and "wrote" in text and re.search(r'"theory": ?{"mean"', page)
    status, _, err = call("report", tmp_path / "nowhere", "--out", tmp_path / "b.html")
    assert status == 1 and "Expected the folder of a run" in err and not (tmp_path / "b.html").exists()


@pytest.mark.parametrize("figure, ending", [("heatmap", ".png"), ("models", ".svg"), ("propagation", ".gif")])
def test_figures_of_a_run(call, trained, tmp_path, figure, ending):
    out = tmp_path / f"picture{ending}"
    status, _, err = call("spp", trained[0], "--figure", figure, "--to", out)
    assert status == 0 and out.stat().st_size > 5000, err
    status, _, err = call("spp", trained[0], "--figure", "portrait")
    assert status == 1 and "heatmap: " in err and "'portrait'" in err
    status, _, err = call("spp", trained[0], "--figure", "heatmap", "--to", tmp_path / "film.gif")
    assert status == 1 and "films show propagation" in err and not (tmp_path / "film.gif").exists()


def test_signals_of_training_can_be_chosen(call, tmp_path):
    out = tmp_path / "run"
    options = ["--signals", "source=live", "--signals", 'statistics=["acsm","nonzero"]']
    status, _, err = call("train", "sn_test_ffnn", *TINY, "--epochs", 1, "--out", out, *options)
    log = nfzoo.spp.read(out)
    assert (
        status == 0 and "live" in set(log.source.dropna()) and {"acsm", "nonzero"} <= set(log) and "acv" not in log
    ), err
    status, _, err = call("train", "sn_test_ffnn", *TINY, "--signals", "sauce=live", "--out", tmp_path / "b")
    assert status == 1 and "sauce" in err
