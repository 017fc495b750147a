"""Plain feed-forward networks: the poster's ten linear layers (its Figures 1 to 3).

Rows are named by depth and width, `bn_ffnn_10x512`; `width=` and `depth=` override them.
"""

from dataclasses import dataclass

from nfzoo.models.sites import Site

ADMITS = ("none", "bn", "sn")
DIALECTS = ("keras",)
PAPER = 'poster "Designing Normalizer-Free EfficientNets"'


@dataclass(frozen=True)
class Spec:
    """One row of the family.

    Attributes:
        depth: number of linear layers, the classifier included.
        width: units of each but the last.
        head_scheme: initialise the classifier as the hidden layers ("hidden"), as the poster's code does.
    """

    depth: int = 10
    width: int = 512
    size: int = 32
    dropout_rate: float = 0.0
    activation: str = "relu"
    classes: int = 100
    head_scheme: str = "hidden"
    dialect: str | None = "keras"
    test_size: int | None = None
    min_size: int = 1

    def __post_init__(self):
        if self.depth < 2 or self.width < 1:
            raise ValueError(f"Expected depth >= 2 and width >= 1. Received: depth={self.depth}, width={self.width}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3


def conventions(spec: Spec, variant: str) -> dict:
    """Fields that follow from the dialect and the variant: none here."""
    return {}


def body(spec: Spec, variant, x):
    """Build everything between the image and the classifier; there is no feature pyramid."""
    if None in x.shape[1:]:
        raise ValueError(
            f"Expected an image of fixed size for a plain network. Received: input_shape={x.shape[1:]}. "
            "Pass input_shape=(height, width, channels) in numbers."
        )
    x = variant.flatten(x)
    for number in range(1, spec.depth):
        site = Site("hidden", role="stem" if number == 1 else "plain", index=number)
        x = variant.norm(variant.dense(x, spec.width, site), site)
        x = variant.tap(variant.act(x, site), f"hidden_out{number}")
    return x, {}


SPECS = {
    "ffnn_10x100": Spec(width=100),
    "ffnn_10x512": Spec(width=512),
    "test_ffnn": Spec(depth=4, width=16, size=8, classes=10),
}
