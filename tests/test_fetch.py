"""Downloads against a server on this machine: resumed, verified, refused; and models with published weights."""

import concurrent.futures
import hashlib
import http.server
import pickle
import re
import threading
from dataclasses import dataclass, field

import h5py
import numpy as np
import pytest
import safetensors.numpy
from conftest import built, same, slow_but

import nfzoo
from nfzoo import names, registry
from nfzoo.convert import deepmind, driver, keras_applications, published
from nfzoo.fetch import fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ADDRESS = "https://files.example.org/folder/model.bin"


@dataclass
class Behaviour:
    """What the server has and does; `asked` collects path and Range of each request."""

    files: dict = field(default_factory=lambda: {"/folder/model.bin": CONTENT})
    cut: int | None = None  # bytes of an answer, after which the connection ends
    ranges: bool = True
    states_length: bool = True
    etag: str | None = None
    redirect: bool = False
    asked: list = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        does, path = self.server.does, self.path.removeprefix("/cdn")
        does.asked.append((self.path, self.headers["Range"]))
        if path not in does.files:
            return self.send_error(404)
        if does.redirect and not self.path.startswith("/cdn"):  # as the hub: its answer states the digest
            return self._answer(302, b"", Location=f"/cdn{path}", **{"X-Linked-ETag": f'"{does.etag}"'})
        content, start = does.files[path], 0
        if does.ranges and self.headers["Range"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(content):
                return self.send_error(416)
        etag = {"X-Linked-ETag": f'"{does.etag}"'} if does.etag and not does.redirect else {}
        self._answer(206 if start else 200, content[start:], **etag)

    def _answer(self, status, body, **headers):
        self.send_response(status)
        if self.server.does.states_length:
            headers["Content-Length"] = len(body)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[: self.server.does.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.does = Behaviour()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("NFZOO_MIRROR", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("NFZOO_HOME", str(tmp_path / "home"))
        yield server.does
        server.shutdown()


def test_a_file_is_downloaded_once(server, tmp_path):
    path = tmp_path / "new" / "model.bin"
    for _ in range(2):
        assert fetch(ADDRESS, path, f"sha256:{SHA256}") == path
        assert path.read_bytes() == CONTENT
    assert server.asked == [("/folder/model.bin", None)] and list(path.parent.iterdir()) == [path]


def test_two_that_want_one_file_get_it_once(server, tmp_path):
    path = tmp_path / "model.bin"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert {*pool.map(lambda _: fetch(ADDRESS, path).read_bytes(), range(4))} == {CONTENT}
    assert len(server.asked) == 1


def test_a_connection_that_breaks_is_resumed_by_the_next_call(server, tmp_path):
    path, server.cut = tmp_path / "model.bin", 100_000
    for kept in (100_000, 200_000):
        with pytest.raises(ConnectionError, match=rf"broke at {kept:,} of 300,000 bytes.*the same call resumes"):
            fetch(ADDRESS, path)
        assert not path.exists() and (tmp_path / "model.bin.partial").stat().st_size == kept
    assert fetch(ADDRESS, path, f"sha256:{SHA256}").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path):
    path, server.cut, server.ranges = tmp_path / "model.bin", 100_000, False
    with pytest.raises(ConnectionError, match="broke at 100,000"):
        fetch(ADDRESS, path)
    server.cut = None
    assert fetch(ADDRESS, path, f"sha256:{SHA256}").read_bytes() == CONTENT


def test_a_partial_file_that_is_longer_than_the_server_s_is_dropped(server, tmp_path):
    (tmp_path / "model.bin.partial").write_bytes(bytes(400_000))
    assert fetch(ADDRESS, tmp_path / "model.bin", f"sha256:{SHA256}").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == ["bytes=400000-", None]


def test_a_cut_that_no_length_tells_is_found_by_the_digest(server, tmp_path):
    server.cut, server.states_length = 100_000, False
    with pytest.raises(ValueError, match="100,000 bytes with"):
        fetch(ADDRESS, tmp_path / "model.bin", f"sha256:{SHA256}")


@pytest.mark.parametrize("stated", ["argument md5", "argument", "header", "redirect"])
def test_other_bytes_are_refused_and_removed(server, stated, tmp_path):
    server.redirect, path = stated == "redirect", tmp_path / "model.bin"
    server.etag = SHA256 if stated in ("header", "redirect") else None
    kind, expected = ("md5", hashlib.md5(CONTENT).hexdigest()) if stated == "argument md5" else ("sha256", SHA256)
    digest = f"{kind}:{expected}" if stated.startswith("argument") else None
    server.files["/folder/model.bin"] = wrong = CONTENT[:-1] + b"x"
    received = hashlib.new(kind, wrong).hexdigest()
    with pytest.raises(ValueError, match=rf"{kind} {expected}\. Received: 300,000 bytes with {received}.*anew"):
        fetch(ADDRESS, path, digest)
    assert not list(tmp_path.glob("model*"))
    server.files["/folder/model.bin"] = CONTENT
    assert fetch(ADDRESS, path, digest).read_bytes() == CONTENT
    assert server.asked[-1][0].startswith("/cdn") == server.redirect


def test_what_is_resumed_upon_other_bytes_is_refused_and_then_downloaded_anew(server, tmp_path):
    (tmp_path / "model.bin.partial").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="the same call downloads the file anew"):
        fetch(ADDRESS, tmp_path / "model.bin", f"sha256:{SHA256}")
    assert fetch(ADDRESS, tmp_path / "model.bin", f"sha256:{SHA256}").read_bytes() == CONTENT


def test_without_a_network_it_says_what_is_missing_and_where_to_put_it(server, tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    with pytest.raises(
        ConnectionError, match=r"/none\.bin\. Received: the answer 404 .*put the file at .*model\.bin by"
    ):
        fetch("https://files.example.org/none.bin", path)
    monkeypatch.setenv("NFZOO_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/folder/model\.bin\. Received: .*refused") as error:
        fetch(ADDRESS, path)
    assert f"put the file at {path} by hand" in str(error.value) and "bytes are kept" not in str(error.value)
    path.write_bytes(b"by hand")
    assert fetch(ADDRESS, path).read_bytes() == b"by hand"


# ---------------------------------------------------------------- published weights
@pytest.fixture
def zoo(server, tiny_timm, monkeypatch, tmp_path):
    """Tiny networks, published by each source."""
    efficientnet = built("bn_test_efficientnet", classes=4)
    nfnet = built("nf_test_nfnet", dialect="deepmind", classes=4)
    rename = deepmind.rule(names.parse("test_nfnet"), names.parse("test_nfnet").spec)
    keras_name = keras_applications.rule(names.parse("bn_test_efficientnet"), names.parse("bn_test_efficientnet").spec)
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        parts = {}
        for v in efficientnet.weights:
            parts.setdefault(keras_name(v.path).split("/")[0], []).append(v)
        file.attrs["layer_names"] = list(parts)
        for layer, variables in parts.items():
            file.create_group(layer).attrs["weight_names"] = [f"{layer}/{v.name}:0" for v in variables]
            for v in variables:
                file[layer].create_dataset(f"{layer}/{v.name}:0", data=np.asarray(v))
    files = {
        ("timm", "test_nfnet"): safetensors.numpy.save(tiny_timm[1]),
        ("timm", "bn_test_efficientnet"): safetensors.numpy.save(
            driver.as_tensors(built("bn_test_efficientnet", classes=4, dialect="timm"))
        ),
        ("deepmind", "nf_test_nfnet"): pickle.dumps({rename(v.path): np.asarray(v) for v in nfnet.weights}),
        ("imagenet", "bn_test_efficientnet"): (tmp_path / "legacy.h5").read_bytes(),
    }
    for (source, name), content in files.items():
        ending = {"timm": "safetensors", "deepmind": "npz", "imagenet": "h5"}[source]
        server.files[f"/{source}/{name}.{ending}"] = content
        digest = f"md5:{hashlib.md5(content).hexdigest()}"
        entry = (f"https://files.example.org/{source}/{name}.{ending}", digest)
        monkeypatch.setitem(published.TABLE[source], name, entry)
    return {"timm": tiny_timm[0], "deepmind": nfnet, "imagenet": efficientnet}


SHAPE = {"input_shape": (64, 64, 3)}


def test_build_with_published_weights(zoo, server, tmp_path):
    assert same(nfzoo.build("test_nfnet", weights="timm", **SHAPE), zoo["timm"])
    assert same(nfzoo.build("nf_test_nfnet", weights="deepmind", **SHAPE), zoo["deepmind"])
    model = nfzoo.build(
        "bn_test_efficientnet", weights="imagenet", name="mine", classifier_activation="softmax", **SHAPE
    )
    assert same(model, zoo["imagenet"]) and model.name == "mine"
    assert np.allclose(np.asarray(model(np.ones((1, 64, 64, 3)))).sum(), 1)
    stored = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*.*")}
    expected = {"timm/test_nfnet.safetensors", "deepmind/nf_test_nfnet.npz", "imagenet/bn_test_efficientnet.h5"}
    assert stored == {f"downloads/{name}" for name in expected}
    nfzoo.build("test_nfnet", weights="timm", **SHAPE)
    assert len(server.asked) == 3


def test_published_weights_get_the_images_they_expect(zoo, server, monkeypatch):
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    key, raw = ("timm", "bn_test_efficientnet"), {"include_preprocessing": True, **SHAPE}
    plain = nfzoo.build("bn_test_efficientnet", weights="timm", **SHAPE)
    mean, std = (np.array(registry.PREPROCESSING[k]) for k in ("mean", "std"))
    for expected in ((x / 255 - mean) / std, x / 127.5 - 1):
        model = nfzoo.build("bn_test_efficientnet", weights="timm", **raw)
        np.testing.assert_allclose(np.asarray(model(x)), np.asarray(plain(expected.astype("float32"))), rtol=1e-4)
        monkeypatch.setitem(published._PREPROCESSING, key, published.preprocessing("timm", "resnetv2_50"))
    monkeypatch.setitem(published._PREPROCESSING, key, published.preprocessing("imagenet", "resnet50"))
    with pytest.raises(ValueError, match="preprocess_input"):
        nfzoo.build("bn_test_efficientnet", weights="timm", **raw)
    assert all(key in published.TABLE[source] for source, key in published._PREPROCESSING)


OTHERWISE = [{"stem": "small"}, {"epsilon": 0.1}, {"activation": "relu"}]


@pytest.mark.parametrize("overrides", slow_but(OTHERWISE[1:2], OTHERWISE))
def test_published_weights_are_not_computed_otherwise(zoo, server, overrides):
    with pytest.raises(ValueError, match=f"{next(iter(overrides))}.*convert.load"):
        nfzoo.build("bn_test_efficientnet", weights="timm", **SHAPE, **overrides)
    assert not server.asked
    usual = {"dropout_rate": 0.5, "drop_path_rate": 0.1, "momentum": 0.9}
    nfzoo.build("bn_test_efficientnet", weights="timm", **SHAPE, **usual)


def test_the_source_decides_the_dialect(zoo):
    """One set of weights, published in the layouts of two: each is computed as its source computes it."""
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    outputs = []
    for source, dialect in (("timm", "timm"), ("imagenet", "keras")):
        model = nfzoo.build("bn_test_efficientnet", weights=source, **SHAPE)
        expected = built("bn_test_efficientnet", dialect=dialect, classes=4)
        assert same(model, expected) and np.array_equal(model(x), expected(x))
        outputs.append(np.asarray(model(x)))
    assert not np.allclose(*outputs, rtol=1e-3)


def test_another_number_of_classes_gets_a_new_classifier_and_no_top_needs_none(zoo):
    stored = {v.path: np.asarray(v) for v in zoo["timm"].weights}
    for options, missing in (
        ({"classes": 7}, 0), ({"classes": 3}, 0), ({"include_top": False}, 2), ({"features_only": True}, 5),
        ({"include_top": False, "classes": 7, "pooling": None}, 2),
    ):  # fmt: skip
        model = nfzoo.build("test_nfnet", weights="timm", **SHAPE, **options)
        assert len(model.weights) == len(stored) - missing
        fresh = {v.path for v in model.weights if not np.array_equal(v, stored[v.path])}
        assert fresh == ({"head/kernel", "head/bias"} if options == {"classes": 7} else set())
    assert nfzoo.build("test_nfnet", weights="timm", classes=7, **SHAPE).output_shape == (None, 7)


def test_an_architecture_without_published_weights(zoo, server):
    with pytest.raises(ValueError, match=r"weights of deepmind: nfnet_f0, .*nfnet_f6.*Received: nf_resnet50"):
        nfzoo.build("nf_resnet50", weights="deepmind")
    with pytest.raises(ValueError, match=r"weights of timm: nf_resnet50, .*dm_nfnet_f0.*Received: nfnet_f0"):
        nfzoo.build("nfnet_f0", weights="timm")  # timm has the weights of DeepMind's reading only
    with pytest.raises(ValueError, match="Did you mean"):
        nfzoo.build("nf_resnet51", weights="timm")
    assert not server.asked


def test_no_network_leaves_a_message(server, monkeypatch, tmp_path):
    monkeypatch.setenv("NFZOO_MIRROR", "http://127.0.0.1:9")
    path = tmp_path / "home" / "downloads" / "timm" / "nf_resnet50.safetensors"
    with pytest.raises(ConnectionError, match=re.escape(f"put the file at {path} by hand")):
        nfzoo.build("nf_resnet50", weights="timm")


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        (("bn_efficientnet_b0", "timm"), "efficientnet_b0"),
        (("efficientnet_b0", "timm", "timm"), "efficientnet_b0"),
        (("bn_efficientnet_b0", "timm", "keras"), "tf_efficientnet_b0"),
        (("EfficientNetB7", "timm"), "tf_efficientnet_b7"),
        (("EfficientNetB7", "imagenet"), "efficientnet_b7"),
        (("tf_efficientnet_b7", "imagenet"), "efficientnet_b7"),
        (("ResNet50V2", "imagenet"), "resnetv2_50"),
        (("bn_resnet152", "imagenet"), "resnet152"),
        (("gn_resnet50", "timm"), "resnet50_gn"),
        (("dm_nfnet_f3", "timm"), "dm_nfnet_f3"),
        (("dm_nfnet_f3", "deepmind"), "nfnet_f3"),
    ],
)
def test_which_weights_a_name_means(asked, key):
    assert published.find(*asked)[0] == key


def test_the_table_names_models_of_the_zoo_and_the_digests_of_keras():
    for source, entries in published.TABLE.items():
        for key, (address, digest) in entries.items():
            assert published.find(key, source) == (key, address, digest)
            assert address.startswith("https://") and (digest is None) == (source == "timm")
    from keras.src.applications import efficientnet, resnet

    theirs = {f"efficientnet{key}": md5 for key, (md5, _) in efficientnet.WEIGHTS_HASHES.items()}
    theirs |= {key: md5 for key, (md5, _) in resnet.WEIGHTS_HASHES.items() if "next" not in key}
    ours = {a.rpartition("/")[2].split(".")[0].split("_")[0]: d for a, d in published.TABLE["imagenet"].values()}
    assert ours == {key: f"md5:{md5}" for key, md5 in theirs.items()}
