"""Published weights: which architecture has them where, and a model that has them."""

from typing import Any

from nfzoo import names, registry, weights
from nfzoo.convert import driver
from nfzoo.fetch import fetch

_HUB = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
_DEEPMIND = "https://storage.googleapis.com/dm-nfnets/F{}_haiku.npz"
_EFFICIENTNET = "https://storage.googleapis.com/keras-applications/efficientnetb{}.h5"
_RESNET = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/{}_weights_tf_dim_ordering_tf_kernels.h5"

_TAGS = (
    "nf_resnet50.ra2_in1k", "nf_regnet_b1.ra2_in1k", "nfnet_l0.ra2_in1k", "eca_nfnet_l0.ra2_in1k",
    "eca_nfnet_l1.ra2_in1k", "eca_nfnet_l2.ra3_in1k", *(f"dm_nfnet_f{n}.dm_in1k" for n in range(7)),
    "resnet18.a1_in1k", "resnet34.a1_in1k", "resnet50.a1_in1k", "resnet101.a1h_in1k", "resnet152.a1h_in1k",
    "resnet50_gn.a1h_in1k", "resnetv2_50.a1h_in1k", "resnetv2_101.a1h_in1k", "resnext50_32x4d.a1h_in1k",
    "seresnext50_32x4d.racm_in1k", "efficientnet_b0.ra_in1k", "efficientnet_b1.ft_in1k", "efficientnet_b2.ra_in1k",
    "efficientnet_b3.ra2_in1k", "efficientnet_b4.ra2_in1k", *(f"tf_efficientnet_b{n}.aa_in1k" for n in range(8)),
)  # fmt: skip
_MD5_DEEPMIND = (
    "0a41039da1cb43adf47f1b7d86ddfe0f", "c9126bbfaf855f9ddb7ff3b902558781", "7a018d8d1498020e2f5a8719a1e7f53f",
    "d8e1e78d26db659c486150dbaccbe78a", "f5974a7e3388aa81b91a9f1403e759a4", "8639e925de951030651ac775b9f915c3",
    "b16cca40ac1ecec2bd5e3273866da0c1",
)  # fmt: skip
_MD5_EFFICIENTNET = (
    "902e53a9f72be733fc0bcb005b3ebbac", "1d254153d4ab51201f1646940f018540", "b15cce36ff4dcbd00b6dd88e7857a6ad",
    "ffd1fdc53d0ce67064dc6a9c7960ede0", "18c95ad55216b8f92d7e70b3a046e2fc", "ace28f2a6363774853a83a0b21b9421a",
    "165f6e37dce68623721b423839de8be5", "8c03f828fec3ef71311cd463b6759d99",
)  # fmt: skip
_MD5_RESNET = {
    "resnet50": "2cb95161c43110f7111970584f804107", "resnet101": "f1aeb4b969a6efcfb50fad2f0c20cfc5",
    "resnet152": "100835be76be38e30d865e96f2aaae62", "resnet50v2": "3ef43a0b657b3be2300d5770ece849e0",
    "resnet101v2": "6343647c601c52e1368623803854d971", "resnet152v2": "a49b44d1979771252814e80f8ec446f9",
}  # fmt: skip

# By source: architecture → (address, digest). The hub states the digests itself.
TABLE: dict[str, dict[str, tuple[str, str | None]]] = {
    "timm": {tag.partition(".")[0]: (_HUB.format(tag), None) for tag in _TAGS},
    "deepmind": {f"nfnet_f{n}": (_DEEPMIND.format(n), f"md5:{md5}") for n, md5 in enumerate(_MD5_DEEPMIND)},
    "imagenet": {
        **{f"efficientnet_b{n}": (_EFFICIENTNET.format(n), f"md5:{md5}") for n, md5 in enumerate(_MD5_EFFICIENTNET)},
        **{
            f"resnetv2_{stem[6:-2]}" if stem.endswith("v2") else stem: (_RESNET.format(stem), f"md5:{md5}")
            for stem, md5 in _MD5_RESNET.items()
        },
    },
}
# What weights expect of their images, by source and architecture, where it is not ImageNet's mean and deviation of
# x / 255; None: what no mean and deviation give, BGR for one.
_TO_MINUS_ONE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_PREPROCESSING: dict[tuple[str, str], dict | None] = {
    **{("timm", f"resnetv2_{n}"): _TO_MINUS_ONE for n in (50, 101)},
    **{("imagenet", f"resnetv2_{n}"): _TO_MINUS_ONE for n in (50, 101, 152)},
    **{("imagenet", f"resnet{n}"): None for n in (50, 101, 152)},
}
_CONVERTER = {"timm": "timm", "deepmind": "deepmind", "imagenet": "keras"}


def load(architecture: str, /, source: str, *, classes: int | None = None, **build_options) -> Any:
    """Build a model with published weights, downloaded to NFZOO_HOME/downloads when they are first asked for.

    Args:
        architecture: name of a model, ours or the source's.
        source: "timm", "deepmind" or "imagenet" (keras.applications); it decides the dialect.
        classes: another number than the file's gives a new classifier upon the published body.
        **build_options: of `nfzoo.build`, without weights; include_preprocessing=True is what these expect.

    Raises:
        ValueError: no such weights (those that exist are listed), a download of another digest, overrides that let the
            network compute otherwise with them, or preprocessing that is none of means and deviations.
        ConnectionError: see `nfzoo.fetch.fetch`.
    """
    registry.resolve(architecture, build_options)  # a mistake is said before the download
    driver.with_dialect(names.parse(architecture), driver.source_module(_CONVERTER[source]), build_options)
    key, address, digest = find(architecture, source, build_options.get("dialect"))
    if build_options.get("include_preprocessing") is True:
        build_options["include_preprocessing"] = _constants(source, key)
    _check_overrides(architecture, source, build_options)
    ending = address.rpartition(".")[-1]
    path = fetch(address, weights.home() / "downloads" / source / f"{key}.{ending}", digest)
    model_name = build_options.pop("name", None)
    try:
        model = driver.load(architecture, _CONVERTER[source], path, model_name, **build_options)
    except ValueError as error:
        if "damaged" in str(error):  # a page of a proxy, say, where the server states no digest
            path.unlink()
            raise ValueError(f"{error} It has been removed; the same call downloads it anew.") from None
        raise
    whole = build_options.get("include_top", True) and not build_options.get("features_only")
    if whole and classes not in (None, model.output_shape[-1]):
        return registry.set_head(model, classes, build_options.get("classifier_activation"))
    return model


def preprocessing(source: str, key: str) -> dict | None:
    """Mean and deviation of x / 255 that published weights expect; None where it is something else.

    Example:
        >>> preprocessing("timm", "resnetv2_50")["mean"]
        (0.5, 0.5, 0.5)
    """
    return _PREPROCESSING.get((source, key), registry.PREPROCESSING)


def _constants(source: str, key: str) -> dict:
    constants = preprocessing(source, key)
    if constants is None:
        raise ValueError(
            f"Expected include_preprocessing=False with the weights of {key}, which take BGR less the means of its "
            "channels: keras.applications.resnet.preprocess_input. Received: include_preprocessing=True"
        )
    return constants


def _check_overrides(architecture: str, source: str, options: dict) -> None:
    """Refuse fields with which a network computes otherwise than the one whose weights these are."""
    overrides = registry.overrides_of(options)
    spoken = {key: overrides.pop(key) for key in ("dialect",) if key in overrides}
    if not overrides:
        return
    size = {"input_shape": options.get("input_shape")} if options.get("input_tensor") is None else {}
    ours, theirs = (
        weights.reading(registry.undrawn(architecture, **of)) for of in (spoken | overrides | size, spoken | size)
    )
    differing = [layer for layer in ours.keys() | theirs.keys() if ours.get(layer) != theirs.get(layer)]
    if differing:
        raise ValueError(
            f"Expected overrides that leave {architecture} what {source}'s weights were trained for. Received: "
            f"{overrides}, which change {weights.shorten(sorted(differing))}. nfzoo.convert.load takes a downloaded "
            "file with overrides as they are."
        )


def source_of(tagged: str) -> str | None:
    """Who publishes "architecture.tag", if anyone."""
    return "timm" if tagged in _TAGS else None


def find(name: str, source: str, dialect: str | None = None) -> tuple[str, str, str | None]:
    """Key, address and digest of an architecture's published weights.

    Example:
        >>> find("bn_efficientnet_b0", "timm", dialect="keras")[1]
        'https://huggingface.co/timm/tf_efficientnet_b0.aa_in1k/resolve/main/model.safetensors'
    """
    asked = names.parse(name)
    for key, (address, digest) in TABLE[source].items():
        known = names.parse(key)
        if str(known) == str(asked) and (source != "timm" or _reading(known) == _reading(asked, dialect)):
            return key, address, digest
    others = [key for key in TABLE[source] if str(names.parse(key)) == str(asked)]
    hint = f", which {source} has in another reading alone: {', '.join(others)}" if others else ""
    raise ValueError(
        f"Expected an architecture with published weights of {source}: {', '.join(TABLE[source])}. "
        f"Received: {name}{hint}"
    )


def _reading(name: names.Name, dialect: str | None = None) -> dict:
    """timm publishes several readings of one architecture; its own dialect is the default."""
    overrides = {"dialect": "timm"} | dict(name.overrides)
    return overrides | ({"dialect": dialect} if dialect else {})
