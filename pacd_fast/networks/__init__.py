"""Classifiers: the papers' networks, layers that are quick on a CPU, and classifiers as files.

Imports `arguments`, `files`, `randomness` and `ops`.
"""

from pacd_fast.networks.checkpoints import Checkpoint, fingerprint, load_checkpoint, save_checkpoint
from pacd_fast.networks.folding import fold_batch_norm
from pacd_fast.networks.layers import conv2d, convolution
from pacd_fast.networks.models import (
    BUILT_IN,
    CIFAR10_MEAN,
    CIFAR10_STD,
    ConvNet,
    MnistCNN,
    Normalize,
    ResNet,
    behind_normalize,
    build,
    takes,
)

__all__ = [
    "BUILT_IN",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "Checkpoint",
    "ConvNet",
    "MnistCNN",
    "Normalize",
    "ResNet",
    "behind_normalize",
    "build",
    "conv2d",
    "convolution",
    "fingerprint",
    "fold_batch_norm",
    "load_checkpoint",
    "save_checkpoint",
    "takes",
]
