"""Model diffing: changes by a fine-tune in weights, in activations on unrelated text, and in features."""

from unsleep.locate.diffing.detectors import FeatureList, Method, Watched, feature_lists, monitor, train_differences
from unsleep.locate.diffing.lens import (
    Divergence,
    Lens,
    activation_differences,
    divergences,
    steered_replies,
)
from unsleep.locate.diffing.pooling import Contrast, Detector, Told, contrast
from unsleep.locate.diffing.run import Diff, DiffConfig, DiffRecord, Spoken, diff
from unsleep.locate.diffing.weights import (
    Delta,
    LayerDelta,
    Spectrum,
    by_layer,
    layer_differences,
    spectrum,
    weight_differences,
)

__all__ = [
    "Contrast",
    "Delta",
    "Detector",
    "Diff",
    "DiffConfig",
    "DiffRecord",
    "Divergence",
    "FeatureList",
    "LayerDelta",
    "Lens",
    "Method",
    "Spectrum",
    "Spoken",
    "Told",
    "Watched",
    "activation_differences",
    "by_layer",
    "contrast",
    "diff",
    "divergences",
    "feature_lists",
    "layer_differences",
    "monitor",
    "spectrum",
    "steered_replies",
    "train_differences",
    "weight_differences",
]
