"""Label-flip certificates, attacks beside them, features that read no label, and the file of certificates.

`certifier` is the classifier and its certificates, `attacks` bound them from above, `features` are learnt without the
labels to be certified, `problems` are data sets as features and what is said about all their points, `results` the
file.  Imports `arguments`, `files`, `randomness`, `tables`, `ops`, `data`, `networks`.
"""

from pacd_fast.labelflips.attacks import attack_logistic, attack_ridge, attack_smoothed, harmful_flips
from pacd_fast.labelflips.certifier import CERTIFICATES, FlipCertificates, LabelFlipCertifier, exact_flips, kl_flips
from pacd_fast.labelflips.features import (
    Whitening,
    fast_ica,
    network_features,
    pca,
    random_convolutions,
    train_feature_network,
)
from pacd_fast.labelflips.problems import FEATURES, FeatureData, certify_data, load_features
from pacd_fast.labelflips.results import (
    ATTACKED,
    UNDEFENDED,
    Curve,
    flips_cells,
    flips_table,
    is_flip_file,
    read_flips,
    summarize_flips,
    write_flips,
)

__all__ = [
    "ATTACKED",
    "CERTIFICATES",
    "Curve",
    "FEATURES",
    "FeatureData",
    "FlipCertificates",
    "LabelFlipCertifier",
    "UNDEFENDED",
    "Whitening",
    "attack_logistic",
    "attack_ridge",
    "attack_smoothed",
    "certify_data",
    "exact_flips",
    "fast_ica",
    "flips_cells",
    "flips_table",
    "harmful_flips",
    "is_flip_file",
    "kl_flips",
    "load_features",
    "network_features",
    "pca",
    "random_convolutions",
    "read_flips",
    "summarize_flips",
    "train_feature_network",
    "write_flips",
]
