"""Keras layers that normalizer-free networks need and Keras lacks.

Every layer is registered under the package name "nfzoo": a saved model loads after `import nfzoo` alone.
"""

from nfzoo.layers.activation import Gate, ScaledActivation, activation_function
from nfzoo.layers.convolution import (
    CompensatePadding,
    Conv2D,
    DepthwiseConv2D,
    ScaledStdConv2D,
    ScaledStdDepthwiseConv2D,
    standardize,
)
from nfzoo.layers.inputs import CenteringBias, StandardizeInput
from nfzoo.layers.normalization import BatchNormalization
from nfzoo.layers.residual import Affine, MaxPool2D, Merge, PadChannels, StochasticDepth, Tap

__all__ = [
    "Affine",
    "BatchNormalization",
    "CenteringBias",
    "CompensatePadding",
    "Conv2D",
    "DepthwiseConv2D",
    "Gate",
    "MaxPool2D",
    "Merge",
    "PadChannels",
    "ScaledActivation",
    "ScaledStdConv2D",
    "ScaledStdDepthwiseConv2D",
    "StandardizeInput",
    "StochasticDepth",
    "Tap",
    "activation_function",
    "standardize",
]
