"""Files of other implementations: every form is read, no code is run, what is damaged is said."""

import argparse
import collections
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy
from conftest import built, same

import nfzoo
from nfzoo.convert import deepmind, pickles, timm, torch_file

SMALL = {"depths": (1, 2), "widths": (32, 64)}

# ---------------------------------------------------------------- PyTorch's files
TORCH = {
    "conv": np.arange(108.0).reshape(4, 3, 3, 3), "transposed": np.arange(24.0).reshape(4, 6).T,
    "part": np.arange(6.0, 18).reshape(3, 4)[:, 1:3], "half": np.arange(4.0), "bfloat16": np.arange(4.0),
    "count": np.array(7), "empty": np.zeros((0, 3)), "flag": np.array([True, False]), "parameter": np.full((2, 2), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_both_formats_of_pytorch(name):
    path = reference.FOLDER / "torch" / f"{name}.pth"
    assert torch_file.read(path)["epoch"] == 3
    tensors = timm.read(path)
    assert tensors.keys() == TORCH.keys()
    assert all(v.shape == TORCH[k].shape and np.array_equal(v, TORCH[k]) for k, v in tensors.items())
    assert tensors["half"].dtype == np.float16 and tensors["bfloat16"].dtype == np.float32


@pytest.mark.parametrize("name", ["zip", "legacy"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.97])
def test_truncated_files_of_pytorch(name, part, tmp_path):
    content = (reference.FOLDER / "torch" / f"{name}.pth").read_bytes()
    path = tmp_path / "model.pth"
    path.write_bytes(content[: int(part * len(content))])
    why = "its end is missing" if name == "zip" else ""
    with pytest.raises(ValueError, match=rf"PyTorch file.*model\.pth, which is damaged: {why}"):
        nfzoo.convert.load("test_nfnet", "timm", path)


def test_a_counter_of_a_schedule_is_read():
    milestones = collections.Counter({30: 1, 60: 2})
    assert pickles.load(pickle.dumps({"milestones": milestones})) == {"milestones": milestones}


def _zip(path, content: bytes, **storages: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {
            "data.pkl": content,
            **{f"data/{key[1:]}": value for key, value in storages.items()},
        }.items():
            archive.writestr(f"archive/{name}", data)
    return path


def _legacy(path, content: bytes):
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in (torch_file._LEGACY_MAGIC, 1001, {})) + content)
    return path


def _tensor(kind="FloatStorage", numbers=2, size=2) -> bytes:
    """The pickle of a tensor, one opcode after the other, since no PyTorch is here to write a wrong one."""
    storage = f"(Vstorage\nctorch\n{kind}\nV0\nVcpu\nI{numbers}\ntQ"
    return f"}}Vw\nctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n(I{size}\nt(I1\nttRs.".encode()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    good = _zip(tmp_path / "good.pth", _tensor(), _0=np.float32([1, 2]).tobytes())
    assert timm.read(good)["w"].tolist() == [1, 2]
    for content, message in (
        (_tensor(size=9), "beyond its storage of 2"),
        (_tensor("HalfTensor"), "torch.HalfTensor"),
        (_tensor("Size"), "unknown reference"),
        (_tensor().replace(b"I2\ntQ", b"I2\nI1\ntQ"), "unknown reference"),  # a storage that views another
    ):
        with pytest.raises(ValueError, match=message):
            timm.read(_zip(tmp_path / "bad.pth", content, _0=bytes(8)))
    with pytest.raises(ValueError, match="damaged.*buffer"):
        timm.read(_zip(tmp_path / "short.pth", _tensor(numbers=9), _0=bytes(8)))
    storage = torch_file.Storage(np.arange(4.0))
    for wrong in ((-1, (2,), (1,)), (0, (2,), (-1,)), (0, (-2,), (1,)), (3, (2,), (1,)), (0, (2, 2), (2, 2))):
        with pytest.raises(ValueError, match="beyond its storage of 4"):
            torch_file._rebuild_tensor(storage, *wrong)
    wraps = (0, (np.int64(2**32 + 1),), (np.int64(2**32),))  # (n - 1) * stride is 2^64, of which int64 keeps nothing
    with pytest.raises(ValueError, match="beyond its storage of 4"):
        torch_file._rebuild_tensor(storage, *wraps)


def test_a_legacy_file_has_every_storage_that_its_tensors_need(tmp_path):
    path = _legacy(tmp_path / "model.pth", _tensor() + pickle.dumps([], 2))
    with pytest.raises(ValueError, match=r"need the storages \['0'\], it has \[\]"):
        timm.read(path)


class _Evil:
    """Writes a file when it is unpickled by a reader that trusts."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "deepmind"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_without_running_it(kind, protocol, tmp_path):
    victim = tmp_path / "executed"
    content = pickle.dumps({"w": _Evil(victim)}, protocol)
    path = tmp_path / ("model.npz" if kind == "deepmind" else "model.pth")
    write = {"zip": _zip, "legacy": _legacy, "deepmind": lambda path, content: path.write_bytes(content)}[kind]
    write(path, content)
    name, source = ("nfnet_f0", "deepmind") if kind == "deepmind" else ("test_nfnet", "timm")
    with pytest.raises(ValueError, match=r"model\.(npz|pth), which names .*open; it is not read"):
        nfzoo.convert.load(name, source, path)
    assert not victim.exists()
    pickle.loads(content)["w"].close()
    assert victim.exists()


class _Forged:
    """An array whose kind of number has a field far outside of it, or addresses in place of numbers."""

    def __init__(self, code, state):
        self.code, self.state = code, state

    def __reduce__(self):
        kind = _Reduced(np.dtype, (self.code, False, True), self.state)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, b"A" * 8)


class _Reduced:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_forged_arrays_are_refused():
    """NumPy itself takes them, and reading their numbers ends the process."""
    field = {"a": (np.dtype("i4"), 10**9)}
    far = pickles.load(pickle.dumps(_Forged("f8", (3, "<", None, ("a",), field, -1, -1, 0))))
    assert far.dtype == np.float64 and far.dtype.fields is None
    addresses = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
    for code in ("V8", "O8"):
        with pytest.raises(ValueError, match=f"arrays of numbers.*'{code}'"):
            pickles.load(pickle.dumps(_Forged(code, addresses)))


def test_checkpoints_of_training_scripts(tiny_timm, tmp_path):
    """Wrapped, with the prefixes of parallel and of compiled modules, beside the options of the run."""
    model, tensors = tiny_timm
    counters = {"bn.num_batches_tracked": np.zeros((), np.int64)}
    for inner in ("state_dict", "state_dict_ema", "model"):
        for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
            wrapped = {inner: {prefix + key: value for key, value in (tensors | counters).items()}, "epoch": 3}
            assert same(nfzoo.convert.load("test_nfnet", "timm", wrapped), model)
    content = b"}Vargs\n" + pickle.dumps(argparse.Namespace(lr=0.1), 2)[2:-1] + b"s" + _tensor()[1:]
    path = _zip(tmp_path / "last.pth.tar", content, _0=bytes(8))
    assert torch_file.read(path)["args"].lr == 0.1
    with pytest.raises(ValueError, match=r"tensors only.*\['args'\]"):
        timm.read(path)


def test_bfloat16_and_other_precisions(tiny_timm, tmp_path):
    model, tensors = tiny_timm
    for kind in (ml_dtypes.bfloat16, np.float16, np.float64):
        path = tmp_path / "model.safetensors"
        safetensors.numpy.save_file({key: value.astype(kind) for key, value in tensors.items()}, path)
        again = nfzoo.convert.load("test_nfnet", "timm", path)
        for ours, theirs in zip(again.weights, model.weights, strict=True):
            assert np.array_equal(ours, np.asarray(theirs).astype(kind).astype(np.float32))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.npz", "model.h5", "model.keras"])
def test_damaged_and_missing_files(name, tmp_path):
    source = {"npz": "deepmind", "h5": "keras", "keras": "keras"}.get(name.split(".")[1], "timm")
    architecture = {"timm": "test_nfnet", "deepmind": "nfnet_f0", "keras": "EfficientNetB0"}[source]
    with pytest.raises(FileNotFoundError, match=name):
        nfzoo.convert.load(architecture, source, tmp_path / name)
    (tmp_path / name).write_bytes(b"damaged bytes" * 9)
    with pytest.raises(ValueError, match=name):
        nfzoo.convert.load(architecture, source, tmp_path / name)
    (tmp_path / "model.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth, \.pt or \.bin.*model\.txt"):
        nfzoo.convert.load("test_nfnet", "timm", tmp_path / "model.txt")


# ---------------------------------------------------------------- DeepMind's
def _haiku(model, name, **options):
    """The weights as DeepMind nests them: module → parameter → array."""
    spec = nfzoo.names.resolve_fields(nfzoo.names.parse(name), {"dialect": "deepmind", **options})[1]
    rename, tree = deepmind.rule(nfzoo.names.parse(name), spec), {}
    for variable in model.weights:
        module, leaf = rename(variable.path).rsplit("/", 1)
        tree.setdefault(module, {})[leaf] = np.asarray(variable)
    return tree


class FlatMapping(dict):
    """Pickles as Haiku's immutable dictionary does: its class, called with a plain dictionary."""

    def __reduce__(self):
        return FlatMapping, (dict(self),)


def test_deepmind_s_files(tmp_path, monkeypatch):
    options = {"dialect": "deepmind", **SMALL}
    model = built("nf_resnet50", classes=4, **options)
    tree = _haiku(model, "nf_resnet50", **SMALL)
    assert tree.keys() > {"NF_ResNet/~/initial_conv", "NF_ResNet/~/nf_res_block", "NF_ResNet/~/nf_res_block_2/~/conv0"}
    flat = {f"{module}/{leaf}": value for module, leaves in tree.items() for leaf, value in leaves.items()}
    path = tmp_path / "haiku.npz"

    def check(weights=path):
        assert same(nfzoo.convert.load("nf_resnet50", "deepmind", weights, input_shape=(64, 64, 3), **options), model)

    for weights in (tree, flat):
        check(weights)
    np.savez(path, **flat)
    check()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(tree, protocol))
        check()
    assert b"numpy._core" in path.read_bytes()
    for name in ("haiku", "haiku._src", "haiku._src.data_structures"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].FlatMapping = FlatMapping
    monkeypatch.setattr(FlatMapping, "__module__", name)
    path.write_bytes(pickle.dumps(FlatMapping({key: FlatMapping(leaves) for key, leaves in tree.items()})))
    assert b"haiku._src" in path.read_bytes()
    check()


def test_arrays_under_both_names_of_numpy_s_modules_and_of_jax():
    for array in (
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.ones((2, 3), np.float32)),
        np.float32(3),
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            new = pickle.dumps(array, protocol)
            assert np.array_equal(pickles.load(new), array)
            if protocol < 4:  # later ones count the letters of a name
                old = new.replace(b"numpy._core.", b"numpy.core.")
                assert old != new and np.array_equal(pickles.load(old), array)
    assert np.array_equal(pickles.load(pickle.dumps(np.ones(3, ml_dtypes.bfloat16))), np.ones(3))
    on_device = pytest.importorskip("jax.numpy").arange(3.0)
    assert pickles.load(pickle.dumps(on_device)).tolist() == [0, 1, 2]


def test_an_npz_file_of_objects_or_with_other_bytes_is_refused(tmp_path):
    path, victim = tmp_path / "F0.npz", tmp_path / "executed"
    np.savez(path, w=np.array([_Evil(victim)], object))
    with pytest.raises(ValueError, match=r"F0\.npz, which fails with: Object arrays"):
        nfzoo.convert.load("nfnet_f0", "deepmind", path)
    assert not victim.exists()
    np.savez(path, w=np.ones(99))
    content = path.read_bytes()
    path.write_bytes(content.replace(np.ones(2).tobytes(), np.zeros(2).tobytes(), 1))
    with pytest.raises(ValueError, match=r"F0\.npz, which fails with: Bad CRC"):
        nfzoo.convert.load("nfnet_f0", "deepmind", path)


@pytest.mark.parametrize(("source", "name"), [("timm", "model.pth"), ("deepmind", "model.npz")])
def test_a_file_of_something_else_than_a_mapping(source, name, tmp_path):
    path = tmp_path / name
    _zip(path, pickle.dumps([1])) if source == "timm" else path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="mapping of names to .* Received: a list"):
        nfzoo.convert.load("nfnet_f0", source, path)


@pytest.mark.parametrize("part", [0.2, 0.9])
def test_a_truncated_pickle(part, tmp_path):
    content = pickle.dumps({"NFNet/~/linear": {"w": np.ones((9, 9))}})
    (tmp_path / "F0.npz").write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"Expected a pickle.*F0\.npz, which is damaged"):
        nfzoo.convert.load("nfnet_f0", "deepmind", tmp_path / "F0.npz")


@pytest.mark.parametrize("target", [("argparse", "Namespace"), ("_codecs", "encode"), ("numpy", "dtype")])
def test_a_pickle_cannot_change_a_class_or_a_function(target):
    """The opcode BUILD sets attributes of whatever lies on the stack, a class or a function of ours too."""
    module, name = target
    state = b"(N(dS'__init__'\nI1\nstt"  # (None, {"__init__": 1}): slots to set
    with pytest.raises(ValueError):
        pickles.load(b"c" + module.encode() + b"\n" + name.encode() + b"\n" + state + b"b.")
    import argparse

    assert argparse.Namespace(a=1).a == 1
