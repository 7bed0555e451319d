"""Training base classifiers and measuring them.

`losses` has one signature for all methods, `loop` is `fit` (`augmentation`: flips, crops; `watching`: what is seen on
the way, `splitting`: a batch shared by processes), `victims` a network from scratch with the papers' settings on disk,
`evaluation` accuracy and the distortion that PGD needs.  Imports `arguments`, `files`, `randomness`, `ranks`, `tables`,
`ops`, `data`, `networks`.
"""

from pacd_fast.training.evaluation import (
    Evaluation,
    correct,
    distortions,
    evaluate,
    evaluation_dict,
    evaluation_table,
    figures,
)
from pacd_fast.training.loop import OPTIMIZERS, digest, fit
from pacd_fast.training.losses import METHODS, Gaussian, Loss, Macer, SmoothAdv, Standard, eval_mode, layout
from pacd_fast.training.splitting import Split, splittable
from pacd_fast.training.victims import Training, hyperparameters, loss_of, network_for, numbered, train

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Evaluation",
    "Gaussian",
    "Loss",
    "Macer",
    "SmoothAdv",
    "Split",
    "Standard",
    "Training",
    "correct",
    "digest",
    "distortions",
    "eval_mode",
    "evaluate",
    "evaluation_dict",
    "evaluation_table",
    "figures",
    "fit",
    "hyperparameters",
    "layout",
    "loss_of",
    "network_for",
    "numbered",
    "splittable",
    "train",
]
