"""What the report calls each quantity, and what it says of it where the log's own description does not."""

from dataclasses import dataclass

KINDS = {
    "activation": "Activations",
    "gradient": "Gradients at layer outputs",
    "weight": "Weights",
    "effective_weight": "Effective weights",
    "weight_gradient": "Gradients of weights",
    "parameter": "Scales, gains and moving statistics",
}
PLACES = {
    "block": "outputs of blocks",
    "branch": "residual branches",
    "merge": "merges",
    "activation": "activations",
    "preactivation": "pre-activations",
    "layer": "other layers",
}


@dataclass(frozen=True)
class Quantity:
    """Name and definition of a statistic; `share` of something: between 0 and 1, never on a logarithmic axis."""

    label: str
    definition: str
    share: bool = False


QUANTITIES: dict[str, Quantity] = {
    "acsm": Quantity(
        "average channel squared mean",
        "Mean over channels of the squared channel mean (NF-ResNet paper, arXiv 2101.08692, section 3).",
    ),
    "acv": Quantity(
        "average channel variance",
        "Mean over channels of the channel's variance (NF-ResNet paper, section 3).",
    ),
    "second_moment": Quantity("second moment", "Mean of x² over everything: with the channel's own mean, ACSM + ACV."),
    "mean": Quantity("mean", "Mean over everything."),
    "norm": Quantity("norm", "Euclidean norm of the whole tensor."),
    "kurtosis": Quantity("kurtosis", "Fourth standardized moment, averaged over channels; 3 for a normal variable."),
    "nonzero": Quantity("non-zero share", "Share of entries that are not zero (EUNNet paper, Figure 5).", share=True),
    "dead": Quantity("dead channels", "Share of channels that are zero everywhere.", share=True),
    "saturated": Quantity("saturated share", "Share of entries close to an end of the channel's range.", share=True),
    "update_to_weight": Quantity(
        "update-to-weight ratio", "Norm of one training step's change of a weight over the norm of the weight."
    ),
    "to_weight": Quantity("gradient-to-weight ratio", "Norm of the gradient over the norm of the weight."),
    "agc_clipped": Quantity(
        "share clipped by AGC",
        "Share of units whose gradient adaptive gradient clipping shortens (NFNet paper, arXiv 2102.06171, "
        "equation 3).",
        share=True,
    ),
    "value": Quantity("value", "Mean of a vector of parameters; of a scalar the scalar itself."),
    "std": Quantity("spread", "Standard deviation within a vector of parameters."),
    "min": Quantity("least", "Least entry of a vector of parameters."),
    "max": Quantity("largest", "Largest entry of a vector of parameters."),
}
# The panels of the overview. "stream" are the outputs of blocks, else of merges, else of all layers.
OVERVIEW = [
    {"title": title, "kind": kind, "group": group, "statistic": statistic}
    for title, kind, group, statistic in (
        ("Squared mean of the stream", "activation", "stream", "acsm"),
        ("Variance of the stream", "activation", "stream", "acv"),
        ("Variance of residual branches", "activation", "branch", "acv"),
        ("Gradients along the stream", "gradient", "stream", "second_moment"),
        ("Weights", "weight", "kernel", "second_moment"),
        ("Effective weights", "effective_weight", "kernel", "second_moment"),
        ("Update over weight", "weight", "kernel", "update_to_weight"),
        ("Clipped by AGC", "weight_gradient", "kernel", "agc_clipped"),
    )
]
