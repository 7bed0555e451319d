"""Label flips: how many changed training labels a prediction survives, and attacks to compare with.

certifier and rules are the method; regularisation chooses the ridge parameter; features, patches and simclr learn
features without labels; problems puts data, certificates and attacks into a file; results and curves read it.
Imports ops, data and what is below them.
"""

from pacd_fast.labelflips.attacks import LogisticAttack, attack_logistic, attack_ridge, attack_smoothed
from pacd_fast.labelflips.certifier import CERTIFICATES, FlipCertificates, LabelFlipCertifier
from pacd_fast.labelflips.features import (
    Whitening,
    fast_ica,
    network_features,
    pca,
    random_convolutions,
    train_feature_network,
)
from pacd_fast.labelflips.patches import PatchFeatures, kmeans_patches
from pacd_fast.labelflips.problems import FeatureData, certify_data, load_features
from pacd_fast.labelflips.rules import exact_flips, kl_flips
from pacd_fast.labelflips.simclr import SimCLR, train_simclr

__all__ = [
    "CERTIFICATES",
    "FeatureData",
    "FlipCertificates",
    "LabelFlipCertifier",
    "LogisticAttack",
    "PatchFeatures",
    "SimCLR",
    "Whitening",
    "attack_logistic",
    "attack_ridge",
    "attack_smoothed",
    "certify_data",
    "exact_flips",
    "fast_ica",
    "kl_flips",
    "kmeans_patches",
    "load_features",
    "network_features",
    "pca",
    "random_convolutions",
    "train_feature_network",
    "train_simclr",
]
