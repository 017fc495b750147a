"""Experiments as rows: what is trained, how often, and what we expect to see, with the source of the expectation.

    python training/reproduce.py first_look
    python training/reproduce.py poster_table1 --seeds 868
    python training/signals.py resnetv2_profiles

An expectation is a test accuracy in percent, or a signal by block, with a tolerance; a result outside it is printed,
not hidden. `TABLES` are trained, `PROFILES` are networks at initialisation.
"""

import math
from dataclasses import dataclass, field
from itertools import chain

from nfzoo.settings import NO_DECAY


@dataclass(frozen=True)
class Row:
    """One cell of a table: a model under a recipe, repeated over seeds."""

    name: str
    model: str
    recipe: str = "poster"
    changes: dict = field(default_factory=dict)  # of the recipe, by dotted paths
    build: dict = field(default_factory=dict)  # of the network, on top of the recipe's
    seeds: tuple[int, ...] = (868,)
    expected: float | None = None
    tolerance: float = 1.5
    source: str = ""
    signals: dict = field(default_factory=dict)  # what is logged: keyword arguments of nfzoo.engine.run


@dataclass(frozen=True)
class Contest:
    """Candidates under one budget; the first `to_beat` of them are those to beat. All get the same trials.

    - A trial is `trial_epochs` at one learning rate with the first seed; the best on validation decides the rate.
    - A semifinal is the whole budget with the first seed: those to beat, and the `semifinalists` best of the trials.
    - A final is the whole budget with the other seeds: those to beat, and the `finalists` best of the semifinals.

    Only then is the test split read, once per run of the finalists. What counts is the candidate that validates best
    over its finals, by its paired difference on the test split to the one of those to beat that validates best. A run
    of the whole budget that one of the tables `known` holds, the same network under the same recipe with the same seed,
    is not run again.
    """

    rows: list[Row]
    to_beat: int = 1
    rates: tuple[float, ...] = (3e-4, 1e-3, 2e-3, 4e-3)
    trial_epochs: int = 4
    semifinalists: int = 13
    finalists: int = 6
    seeds: tuple[int, ...] = (868, 67, 472)
    known: tuple[str, ...] = ()
    taps: str | None = "blocks"  # whose signals the semifinals keep


@dataclass(frozen=True)
class Profile:
    """A network at initialisation on N(0, 1) images, in training mode; block 0 is the stem.

    Attributes:
        variance, square: block -> average channel variance, mean square of its output.
        branch, mean: least and largest average channel variance of the residual branches, and average channel squared
            mean of the outputs (the stem's left out).
        tolerance: relative, of all of them.
    """

    name: str
    model: str
    build: dict = field(default_factory=dict)
    size: int = 128
    batch: int = 8
    seeds: tuple[int, ...] = (0,)
    variance: dict[int, float] = field(default_factory=dict)
    square: dict[int, float] = field(default_factory=dict)
    branch: tuple[float, float] | None = None
    mean: tuple[float, float] | None = None
    tolerance: float = 0.1
    source: str = ""


_EARLY = {"epochs": 3}
_POSTER_CODE = "the poster's PyTorch code after 3 epochs, lr 0.001, seed 868, one run of ours"
_POSTER = "poster, Table 1, mean of 5 seeds"
_SEEDS = (868, 67, 472, 362, 970)
_NO_MP = {"magnitude_preserving": False}
_THESIS = "thesis behind the poster, Table 3, mean of 5 seeds"
_FIXED = {"scale": False, "center": False, "stem_affine": True}
_LAYERS = {"taps": "layers"}
_SPP = {"changes": {"epochs": 5}, "signals": _LAYERS}
_FFNN = {"seeds": _SEEDS[:3], "source": _THESIS, "signals": _LAYERS}
# Adam instead of the paper's SGD: in 270 steps there is no room for its warm-up.
_PHOTOS = {
    "data.name": "runs/imagenette", "data.image_size": 64, "augment.crop_padding": 4, "augment.flip": True,
    "agc": None, "batch_size": 64, "epochs": 6,
}  # fmt: skip

# Photos of ten classes at 32 pixels, the same 23,000 examples whatever the batch; the learning rate goes with it.
_SMALL = {"data.name": "runs/imagenette", "data.image_size": 32, "agc": None, "epochs": 8}

_CHANCE = (1.0, 0.1)


def _rates(
    name: str, model: str, expected: dict[float, tuple[float, float]], source: str, build: dict | None = None
) -> list[Row]:
    """A row of a paper's table: its learning rates, with what it found and twice its deviation."""
    return [
        Row(
            name if rate == 1e-3 else f"{name}, lr {rate:g}", model, build=build or {}, seeds=_SEEDS, expected=mean,
            changes={} if rate == 1e-3 else {"optimizer.learning_rate": rate}, tolerance=tolerance, source=source,
        )
        for rate, (mean, tolerance) in expected.items()
    ]  # fmt: skip


TABLES: dict[str, list[Row]] = {
    # CIFAR-100 at 32x32 under the poster's recipe, but 3 epochs instead of 20.
    "first_look": [
        Row("BN", "bn_efficientnet_b0", changes=_EARLY, expected=12.2, source=_POSTER_CODE),
        Row("no BN", "none_efficientnet_b0", changes=_EARLY, expected=1.0, tolerance=0.1, source=_POSTER),
        Row("SN, MP", "sn_efficientnet_b0", changes=_EARLY, expected=14.7, source=_POSTER_CODE),
        Row("SN, no MP", "sn_efficientnet_b0", changes=_EARLY, build=_NO_MP, expected=15.4, source=_POSTER_CODE),
        Row("NF, AGC 0.01", "nf_efficientnet_b0", changes={**_EARLY, "agc": 0.01}),
    ],
    # The poster's Table 1, and what it leaves out, by the same protocol.
    "poster_table1": [
        *_rates("BN", "bn_efficientnet_b0", {1e-3: (33.5, 1.6), 1e-2: (13.9, 6.8), 1e-1: (1.2, 0.8)}, _POSTER),
        *_rates("no BN", "none_efficientnet_b0", {rate: _CHANCE for rate in (1e-3, 1e-2, 1e-1)}, _POSTER),
        *_rates("SN, MP", "sn_efficientnet_b0", {1e-3: (29.2, 1.0), 1e-2: _CHANCE, 1e-1: _CHANCE}, _POSTER),
        *_rates("SN, no MP", "sn_efficientnet_b0", {1e-3: (30.0, 1.0), 1e-2: _CHANCE, 1e-1: _CHANCE}, _POSTER, _NO_MP),
        Row("NF, AGC 0.01", "nf_efficientnet_b0", changes={"agc": 0.01}, seeds=_SEEDS),
        Row("NF, no AGC", "nf_efficientnet_b0"),
        Row("GN", "gn_efficientnet_b0"),
        Row("SkipInit", "skipinit_efficientnet_b0"),
        Row("Fixup", "fixup_efficientnet_b0"),
        Row("SN, MP, standardized kernels", "sn_efficientnet_b0", build={"standardize": True}),
        Row("no BN, He by fan-in", "none_efficientnet_b0", build={"init": "he"}),
        Row("BN, lr 0.002", "bn_efficientnet_b0", changes={"optimizer.learning_rate": 2e-3}),
        Row("BN, small stem", "bn_efficientnet_b0", build={"stem": "small"}),
        Row("NF, AGC 0.01, small stem", "nf_efficientnet_b0", changes={"agc": 0.01}, build={"stem": "small"}),
    ],
    # The poster's Figures 1 to 3: ten linear layers. Without scale and shift the first normalization keeps its own.
    "ffnn_gradients": [
        Row("no BN", "none_ffnn_10x512", expected=19.5, **_FFNN),
        Row("BN without scale and shift", "bn_ffnn_10x512", build=_FIXED, expected=18.4, **_FFNN),
        Row("BN", "bn_ffnn_10x512", expected=23.9, **_FFNN),
    ],
    # The thesis behind the poster, Table 3: ten linear layers, all learning rates.
    "ffnn_table3": [
        *_rates("FFNN, no BN", "none_ffnn_10x512", {1e-3: (19.5, 1.0), 1e-2: (2.2, 4.8), 1e-1: _CHANCE}, _THESIS),
        *_rates("FFNN, BN", "bn_ffnn_10x512", {1e-3: (23.9, 0.6), 1e-2: (19.5, 1.4), 1e-1: (8.6, 8.0)}, _THESIS),
        *_rates("FFNN, BN without scale and shift", "bn_ffnn_10x512", {1e-3: (18.4, 0.4)}, _THESIS, _FIXED),
    ],
    # The poster's Figures 4 and 5: every layer's signals while training, over the first 5 of its 20 epochs.
    "efficientnet_signals": [
        Row("no BN", "none_efficientnet_b0", expected=1.0, tolerance=0.1, source=_POSTER, **_SPP),
        Row("SN, MP", "sn_efficientnet_b0", **_SPP),
        Row("SN, no MP", "sn_efficientnet_b0", build=_NO_MP, **_SPP),
    ],
    # EUNNet's Figures 5 and 7, small: Imagenette's folder (train/, val/) as runs/imagenette, images of 64 pixels.
    "eunnet_activations": [
        Row("BN", "bn_resnet50", "demo", changes=_PHOTOS, build={"epsilon": 1e-5}, seeds=(0,)),
        Row("EUN", "eun_resnet50", "demo", changes=_PHOTOS, seeds=(0,)),
    ],
}

TABLES["small_batches"] = [
    Row(
        f"{name}, batch {batch}", f"{name[:2].lower()}_resnet20_cifar", "small_batch",
        changes={**_SMALL, "batch_size": batch}, build=build, seeds=(0, 1, 2),
    )
    for name, build in {"BN": {}, "GN": {}, "SN": {}, "NF": {}, "NF open": {"skip_gain": 1.0}}.items()
    for batch in (2, 4, 16, 128)
]  # fmt: skip

# Branches that are open from the start, and what zero padding takes given back.
_OPEN = {"skip_gain": 1.0, "padding_compensation": True}
_SELU = {**_OPEN, "activation": "selu", "alpha": 0.5}
_PLAIN = {**_SELU, "standardize": False}
# Of SiLU He's initialisation keeps the mean square; what padding takes keeps it from growing over the blocks.
_PLAIN_SILU = {"skip_gain": 1.0, "standardize": False, "init": "he"}
_PLAIN_DEPTHWISE = {"skip_gain": 1.0, "standardize_depthwise": False}
_BUDGET_B = {"recipe": "cifar", "changes": {"epochs": 8}}
_DECAY = {"optimizer.weight_decay": 0.5, "optimizer.groups": [NO_DECAY.model_dump()]}

CONTESTS: dict[str, Contest] = {
    # The poster's budget: CIFAR-100 at 32 pixels, stride 2 in the stem, Adam, batch 512, 20 epochs at one rate.
    "A": Contest(
        [
            Row("BN", "bn_efficientnet_b0"),
            Row("BN, stochastic depth", "bn_efficientnet_b0", build={"drop_path_rate": 0.2}),
            Row("SN, MP", "sn_efficientnet_b0"),
            Row("SN, no MP", "sn_efficientnet_b0", build=_NO_MP),
            Row("no BN, He by fan-in", "none_efficientnet_b0", build={"init": "he"}),
            Row("SN, MP, even", "sn_efficientnet_b0", build={"doubled_gate": True, "padding_compensation": True}),
            # Controls: branches closed, and open without what padding takes.
            Row("NF, no AGC", "nf_efficientnet_b0"),
            Row("NF, gain 1", "nf_efficientnet_b0", build={"skip_gain": 1.0}),
            Row("NF, open", "nf_efficientnet_b0", build=_OPEN),
            Row("NF, open, AGC 0.02", "nf_efficientnet_b0", changes={"agc": 0.02}, build=_OPEN),
            Row("NF, open, alpha 0.5", "nf_efficientnet_b0", build={**_OPEN, "alpha": 0.5}),
            Row("NF, open, SELU", "nf_efficientnet_b0", build=_SELU),
            Row("NF, gain 1, plain depthwise", "nf_efficientnet_b0", build=_PLAIN_DEPTHWISE),
            Row(
                "NF, gain 1, plain depthwise, stochastic depth", "nf_efficientnet_b0",
                build={**_PLAIN_DEPTHWISE, "drop_path_rate": 0.2},
            ),
            Row("NF, gain 1, plain", "nf_efficientnet_b0", build=_PLAIN_SILU),
            Row(
                "NF, gain 1, plain, stochastic depth", "nf_efficientnet_b0",
                build={**_PLAIN_SILU, "drop_path_rate": 0.2},
            ),
            Row("NF, gain 1, plain, alpha 0.5", "nf_efficientnet_b0", build={**_PLAIN_SILU, "alpha": 0.5}),
            Row("NF, open, plain SELU", "nf_efficientnet_b0", build=_PLAIN),
            Row(
                "NF, open, plain SELU, stochastic depth", "nf_efficientnet_b0",
                build={**_PLAIN, "drop_path_rate": 0.2},
            ),
            Row("NF, open, plain SELU, decay", "nf_efficientnet_b0", changes=_DECAY, build=_PLAIN),
        ],
        to_beat=2,
        known=("poster_table1",),
    ),
    # Good practice at 32 pixels (nfzoo.recipes): no stride in the stem, warm-up and cosine, mixup, label smoothing,
    # stochastic depth, decoupled weight decay, a moving average; as many epochs as a CPU has time for. BN and the two
    # networks that are best on validation after A's semifinals; stochastic depth comes with the recipe, for all.
    "B": Contest(
        [
            Row("BN", "bn_efficientnet_b0", **_BUDGET_B),
            Row("NF, gain 1, plain depthwise", "pnf_efficientnet_b0", **_BUDGET_B),
            Row("NF, gain 1, plain", "nf_efficientnet_b0", build=_PLAIN_SILU, **_BUDGET_B),
        ],
        rates=(2e-3, 4e-3, 8e-3),
        trial_epochs=3,
        semifinalists=2,
        finalists=2,
        taps=None,
    ),
}  # fmt: skip

_HE = {"init": "he", "dialect": "deepmind"}
_NF = {"alpha": 1.0, "skip_gain": 1.0}
_DRAWS = (0, 1, 2, 3, 4)
_REFERENCE = "DeepMind's code, one draw"
_THEORY = (
    "theory: branch r = 2 Var relu(z) = 1 - 1/pi, or 2 with ReLU first; a stage starts at 2 r and adds r per block"
)


def _by_block(*stages: tuple[float, ...]) -> dict[int, float]:
    return dict(enumerate(chain(*stages), 1))


def _linear(rise: float, depths: tuple[int, ...] = (50, 50, 50, 50)) -> dict[int, float]:
    """A stage starts with shortcut plus branch, and adds a branch per block."""
    return _by_block(*([rise * (2 + block) for block in range(depth)] for depth in depths))


def _plain_squares(stem: float, depths: tuple[int, ...], size: int) -> dict[int, float]:
    """Mean squares without weight standardization, in expectation over He weights: a convolution of ReLU(x) gives back
    the mean square of x, times the share of its taps that lie within the map. After the pooling of the stem x > 0, and
    ReLU halves nothing.
    """
    squares, square, beta2 = [], stem, 1
    for stage, depth in enumerate(depths):
        for block in range(depth):
            taps = (3 * size - 2) / (3 * size)
            if stage and not block:
                size //= 2
                taps = (3 * size - 1) / (3 * size)  # stride 2 meets the border on one side
            entered = square / beta2 * (1 if squares else 2)
            square = (square if block else entered) + entered * taps**2
            beta2 = block + 2
            squares.append(square)
    return _by_block(squares)


PROFILES: dict[str, list[Profile]] = {
    # The NF-ResNet paper's Figures 1 and 2, at depth 50 and 600 and 128 pixels.
    "resnetv2_profiles": [
        Profile(
            "50, BN-ReLU-Conv", "bn_resnetv2_50", {**_HE, "order": "bn-relu-conv"}, seeds=_DRAWS, source=_REFERENCE,
            branch=(0.68, 0.70), mean=(0.64, 2.14), variance=_by_block(
                (1.48, 2.16, 2.86), (1.39, 2.07, 2.76, 3.44), (1.38, 2.06, 2.74, 3.44, 4.13, 4.82), (1.37, 2.05, 2.74)
            ),
        ),
        Profile(
            "50, ReLU-BN-Conv", "bn_resnetv2_50", {**_HE, "order": "relu-bn-conv"}, seeds=_DRAWS, source=_REFERENCE,
            branch=(2, 2), mean=(0, 0.02), variance=_linear(2, (3, 4, 6, 3)),
        ),
        Profile(
            "50, NF", "nf_resnetv2_50", _NF, seeds=_DRAWS, source=_REFERENCE, branch=(0.62, 1.0), mean=(0, 0.05),
            variance={
                **_by_block((2.02, 3.00, 4.02), (1.97, 2.90, 3.82, 4.75)), 8: 1.86, 13: 5.86,
                14: 1.60, 15: 2.26, 16: 2.88,
            },
        ),
        # Nothing holds the mean here: a draw of the weights differs from the next by tens of percent, and the reference
        # is one. The squares (4.95 after the stem) are theory for the mean over draws.
        Profile(
            "50, NF without WS", "nf_resnetv2_50", {**_NF, "init": "he", "standardize": False}, source=_REFERENCE,
            seeds=tuple(range(20)), branch=(1.5, 3.4), mean=(22, 93),
            variance={1: 3.4, 2: 5.1, 3: 6.8, 13: 19.5, 16: 11.6}, square=_plain_squares(4.95, (3, 4, 6, 3), 32),
        ),
        Profile(
            "600, BN-ReLU-Conv", "bn_resnetv2_600", {**_HE, "order": "bn-relu-conv"}, batch=2, source=_THEORY,
            variance=_linear(1 - 1 / math.pi),
        ),
        Profile(
            "600, ReLU-BN-Conv", "bn_resnetv2_600", {**_HE, "order": "relu-bn-conv"}, batch=2, source=_THEORY,
            variance=_linear(2),
        ),
        Profile(
            "600, NF", "nf_resnetv2_600", _NF, batch=2, source=_REFERENCE, branch=(0.34, 1.0), mean=(0, 0.85),
            variance={1: 2.05, 10: 11.2, 25: 26.3, 50: 51.3, 51: 1.98, 75: 24.2, 100: 46.6, 150: 37.4, 200: 21.0},
        ),
        Profile("600, NF without WS", "nf_resnetv2_600", {**_NF, "init": "he", "standardize": False}, batch=2),
    ],
}  # fmt: skip
