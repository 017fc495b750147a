"""Experiments as rows: what is trained, how often, and what we expect to see, with the source of the expectation.

    python training/reproduce.py first_look
    python training/reproduce.py poster_table1 --seeds 868

An expectation is a test accuracy in percent with a tolerance; a result outside it is printed, not hidden.
"""

from dataclasses import dataclass, field


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


_EARLY = {"epochs": 3}
_POSTER_CODE = "the poster's PyTorch code after 3 epochs, lr 0.001, seed 868, one run of ours"
_POSTER = "poster, Table 1, mean of 5 seeds"
_SEEDS = (868, 67, 472, 362, 970)
_NO_MP = {"magnitude_preserving": False}

TABLES: dict[str, list[Row]] = {
    # CIFAR-100 at 32x32 under the poster's recipe, but 3 epochs instead of 20.
    "first_look": [
        Row("BN", "bn_efficientnet_b0", changes=_EARLY, expected=12.2, source=_POSTER_CODE),
        Row("no BN", "none_efficientnet_b0", changes=_EARLY, expected=1.0, tolerance=0.1, source=_POSTER),
        Row("SN, MP", "sn_efficientnet_b0", changes=_EARLY, expected=14.7, source=_POSTER_CODE),
        Row("SN, no MP", "sn_efficientnet_b0", changes=_EARLY, build=_NO_MP, expected=15.4, source=_POSTER_CODE),
        Row("NF, AGC 0.01", "nf_efficientnet_b0", changes={**_EARLY, "agc": 0.01}),
    ],
    # The poster's Table 1 at its best learning rate, 20 epochs, and the normalizer-free network under the same recipe.
    "poster_table1": [
        Row("BN", "bn_efficientnet_b0", seeds=_SEEDS, expected=33.5, tolerance=1.6, source=_POSTER),
        Row("no BN", "none_efficientnet_b0", seeds=_SEEDS, expected=1.0, tolerance=0.1, source=_POSTER),
        Row("SN, MP", "sn_efficientnet_b0", seeds=_SEEDS, expected=29.2, tolerance=1.0, source=_POSTER),
        Row(
            "SN, no MP", "sn_efficientnet_b0", build=_NO_MP, seeds=_SEEDS, expected=30.0, tolerance=1.0, source=_POSTER
        ),
        Row("NF, AGC 0.01", "nf_efficientnet_b0", changes={"agc": 0.01}, seeds=_SEEDS),
    ],
}
