"""Attacks through the training data, the files that carry them, and what they do to victims.

`poison` is the ball and the file, `pacd_crafting` (with `pacd_settings`) lowers the certified radius of a class,
`metapoison_crafting` (with `metapoison_settings`) makes victims misclassify test images, `baselines` are what both are
compared with; `auditing` judges poison of a class by certified victims, `targeted` poison of test images by their
predictions; `theory` has the answers that are known on paper.  Imports everything but `labelflips`, `experiments` and
`cli`.
"""

from pacd_fast.poisoning.auditing import Audit, Audited, audit, audit_rows, fall, pooled_certificates, save_audit
from pacd_fast.poisoning.baselines import noise_beside, random, watermark, watermark_beside
from pacd_fast.poisoning.metapoison_crafting import Step, metapoison
from pacd_fast.poisoning.metapoison_settings import OBJECTIVES, MetaPoison, adversarial_loss, margin
from pacd_fast.poisoning.pacd_crafting import choose, lower_problem, pacd
from pacd_fast.poisoning.pacd_settings import PRESETS, Accuracy, Pacd, Preset, Radius, Recipe, Upper
from pacd_fast.poisoning.poison import NORMS, Ball, ClassAim, Poison, TargetsAim
from pacd_fast.poisoning.targeted import (
    COMPANIONS,
    Victim,
    VictimRecipe,
    audit_targets,
    judge_victims,
    summarize_victims,
    victims_table,
)

__all__ = [
    "COMPANIONS",
    "NORMS",
    "OBJECTIVES",
    "PRESETS",
    "Accuracy",
    "Audit",
    "Audited",
    "Ball",
    "ClassAim",
    "MetaPoison",
    "Pacd",
    "Poison",
    "Preset",
    "Radius",
    "Recipe",
    "Step",
    "TargetsAim",
    "Upper",
    "Victim",
    "VictimRecipe",
    "adversarial_loss",
    "audit",
    "audit_rows",
    "audit_targets",
    "choose",
    "fall",
    "judge_victims",
    "lower_problem",
    "margin",
    "metapoison",
    "noise_beside",
    "pacd",
    "pooled_certificates",
    "random",
    "save_audit",
    "summarize_victims",
    "victims_table",
    "watermark",
    "watermark_beside",
]
