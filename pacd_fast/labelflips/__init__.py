"""Label flips: how many changed training labels a prediction survives, and attacks to compare with.

`certifier` is the classifier, `rules` its certificates, `regularisation` the choice of its ridge parameter; `attacks`
and `logistic` bound them from above; `features`, `patches` and `simclr` learn features without the labels to be
certified; `problems` put all that is said about a data set's points into a file, which `results` writes and checks and
`curves` reads.
Imports `arguments`, `files`, `randomness`, `tables`, `ops`, `data`.
"""

from pacd_fast.labelflips.attacks import attack_ridge, attack_smoothed, harmful_flips
from pacd_fast.labelflips.certifier import CERTIFICATES, FlipCertificates, LabelFlipCertifier
from pacd_fast.labelflips.curves import CONDITIONAL, FLIPS, Curve, flips_cells, flips_summary, flips_table, read_flips
from pacd_fast.labelflips.features import (
    Whitening,
    fast_ica,
    network_features,
    pca,
    random_convolutions,
    train_feature_network,
)
from pacd_fast.labelflips.logistic import LogisticAttack, attack_logistic
from pacd_fast.labelflips.patches import PatchFeatures, kmeans_patches
from pacd_fast.labelflips.problems import FEATURES, FeatureData, certify_data, load_features, scan
from pacd_fast.labelflips.results import ATTACKED, UNDEFENDED, is_flip_file
from pacd_fast.labelflips.rules import exact_flips, kl_flips
from pacd_fast.labelflips.simclr import SimCLR, train_simclr

__all__ = [
    "ATTACKED",
    "CERTIFICATES",
    "CONDITIONAL",
    "Curve",
    "FEATURES",
    "FLIPS",
    "FeatureData",
    "FlipCertificates",
    "LabelFlipCertifier",
    "LogisticAttack",
    "PatchFeatures",
    "SimCLR",
    "UNDEFENDED",
    "Whitening",
    "attack_logistic",
    "attack_ridge",
    "attack_smoothed",
    "certify_data",
    "exact_flips",
    "fast_ica",
    "flips_cells",
    "flips_summary",
    "flips_table",
    "harmful_flips",
    "is_flip_file",
    "kl_flips",
    "kmeans_patches",
    "load_features",
    "network_features",
    "pca",
    "random_convolutions",
    "read_flips",
    "scan",
    "train_feature_network",
    "train_simclr",
]
