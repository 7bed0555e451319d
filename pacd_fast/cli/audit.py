"""pacd-fast audit: victims with and without poison, certified or asked for the targets, side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pacd_fast.arguments import DTYPES, at_least, whole_number
from pacd_fast.cli.flags import add_data, add_device, add_fields, device_of, given, load_data
from pacd_fast.cli.train import add_hyperparameters, hyperparameters_given
from pacd_fast.data import Dataset
from pacd_fast.experiments import plots
from pacd_fast.files import AnotherRun, replaced
from pacd_fast.poisoning import (
    COMPANIONS,
    Audit,
    ClassAim,
    Poison,
    TargetsAim,
    VictimRecipe,
    audit,
    audit_rows,
    audit_targets,
    pooled_certificates,
    save_audit,
    victims_table,
)
from pacd_fast.ranks import Ranks
from pacd_fast.tables import columns
from pacd_fast.training import Training


def add_commands(add: Any) -> None:
    sub = add("audit", run, "what poison does: train victims with and without it, certify, compare")
    add_data(sub, held_out=None)
    sub.add_argument("--poison", nargs="+", required=True, help="poison files: a row of the table each")
    targeted = "; of targeted poison as its surrogates"
    texts = {
        field.name: f"{field.metadata['help']}; by default {field.default}{targeted}"
        for field in Training.__dataclass_fields__.values()
        if field.name in ("epochs", "batch_size", "lr", "weight_decay", "optimizer")
    }
    texts["method"] = "how the victims train; by default gaussian"
    skip = ("hyperparameters", "dtype", "microbatch", "drops")
    add_fields(sub, Training, skip=skip, optional=True, texts=texts)
    add_hyperparameters(sub, sigma="the poison's, with which victims are certified too")
    sub.add_argument("--target-class", help="class to certify, its name or number; by default the poison's")
    sub.add_argument("--seeds", type=whole_number, default=5, help="victims for every training set")
    sub.add_argument("--first-seed", type=whole_number, default=0)
    sub.add_argument(
        "--against", nargs="*", choices=COMPANIONS, default=list(COMPANIONS),
        help="what targeted poison is compared with",
    )  # fmt: skip
    sub.add_argument("--train-dtype", choices=DTYPES, default="float32", help="of training")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of certification")
    sub.add_argument("--count", type=whole_number, default=500, help="test images of the class to certify")
    sub.add_argument("--n", type=whole_number, default=100_000, help="samples for each of them")
    sub.add_argument("--others", type=whole_number, default=200, help="test images of the other classes; 0 for none")
    sub.add_argument("--others-n", type=whole_number, default=10_000, help="samples for each of them")
    sub.add_argument(
        "--attacked", type=whole_number, default=50, help="images of the class for the PGD distortion; 0 for none"
    )
    add_device(sub)
    sub.add_argument("--work", default="audit", help="folder for victims, results files, curves, audit.json")


def run(options: argparse.Namespace) -> None:
    for name in ("seeds", "count", "n", "others_n"):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    for name in ("others", "attacked", "first_seed"):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), 0)
    device, ranks = device_of(options.device), Ranks.of_torchrun()
    files = {Path(path).stem: path for path in options.poison}
    if len(files) < len(options.poison):
        raise ValueError("two poison files have the same name: rename one")
    poisons = {name: Poison.load(path) for name, path in files.items()}
    held = next(iter(poisons.values())).settings
    data = load_data(options, held.get("validation"), held.get("train_images"))
    for poison in poisons.values():
        poison.apply(data)  # before any training: is it for these data?
    aims = {name: poison.aim for name, poison in poisons.items()}
    if any(isinstance(aim, TargetsAim) for aim in aims.values()):
        if not all(isinstance(aim, TargetsAim) for aim in aims.values()):
            raise ValueError("targeted poison and poison of a class are judged differently: audit them one by one")
        if options.method is not None:
            raise ValueError("--method is for poison of a class: victims of targeted poison train like its surrogates")
        _audit_targets(options, data, poisons, device, ranks)
        return
    settings = _settings(options, data, [aim for aim in aims.values() if isinstance(aim, ClassAim)])
    work = Path(options.work)
    try:
        found = audit(data, poisons, settings, work, device=device, progress=True, ranks=ranks)
    except AnotherRun as error:
        raise ValueError(f"{error}; or give another --work") from error
    if ranks.rank:
        return
    method, target = settings.training.method, data.class_names[settings.target_class]
    title = f"class {target}, {method}, victims a training set: {settings.seeds}"
    plots.certified_accuracy(dict(pooled_certificates(list(found), settings, work)), work / "curves.png", title)
    save_audit(work / "audit.json", settings, found, poisons)
    print(columns(audit_rows(found)))
    print(f"curves {work / 'curves.png'}, everything {work / 'audit.json'}", file=sys.stderr)


def _settings(options: argparse.Namespace, data: Dataset, aims: list[ClassAim]) -> Audit:
    """What the command line asks for and, where it does not say, what the poison files do."""
    decided = {"target_class": options.target_class, "targets": None, "sigma": options.sigma}
    for name, flag in decided.items():
        said = {str(value) for aim in aims if (value := getattr(aim, name)) is not None}
        if flag is None and len(said) > 1:
            raise ValueError(f"the poison files differ in {name} ({', '.join(sorted(said))}): audit them one by one")
    if options.target_class is not None:
        target = data.class_index(options.target_class)
    elif aims:
        target = data.class_index(str(aims[0].target_class))
    else:
        raise ValueError("the poison file does not say which class it is for: give --target-class")
    hyperparameters = hyperparameters_given(options)
    sigma = hyperparameters.get("sigma", next((aim.sigma for aim in aims if aim.sigma), None))
    if sigma is None:
        raise ValueError("the poison file does not say which noise to certify with: give --sigma")
    method = options.method or "gaussian"
    hyperparameters.pop("sigma", None)
    if method != "standard":  # else trained without noise, certified with it
        hyperparameters["sigma"] = sigma
    skip = ("method", "hyperparameters", "dtype")
    training = Training(method, hyperparameters, dtype=options.train_dtype, **given(Training, options, skip=skip))
    training.resolved(data)  # before any training: hyperparameters that the method has
    return Audit(
        training,
        target,
        sigma,
        seeds=options.seeds,
        first_seed=options.first_seed,
        images=min(options.count, int((data.y_test == target).sum())),
        n=options.n,
        others=min(options.others, int((data.y_test != target).sum())),
        others_n=options.others_n,
        attacked=min(options.attacked, int((data.y_test == target).sum())),
        dtype=options.dtype,
        indices=next((aim.targets for aim in aims if aim.targets), None),
    )


def _audit_targets(
    options: argparse.Namespace, data: Dataset, poisons: Mapping[str, Poison], device: torch.device, ranks: Ranks
) -> None:
    """MetaPoison: how often do victims take the targets for the adversarial class, and what does it cost elsewhere?"""
    names = ("model", "epochs", "batch_size", "lr", "optimizer", "weight_decay", "augment")
    changes = {name: getattr(options, name) for name in names}
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, poison in poisons.items():
        aim = poison.targets_aim()
        recipe = VictimRecipe.of(poison, **changes)
        found[name] = audit_targets(
            poison, data, recipe, count=options.seeds, seed=options.first_seed, against=options.against,
            out=work / f"{name}.jsonl", device=device, progress=True, ranks=ranks,
        )  # fmt: skip
        if ranks.rank:
            continue
        adversarial = data.class_names[aim.adversarial_class]
        print(f"{name}: test images {list(aim.target_index)} to be taken for {adversarial}")
        print(victims_table(found[name]))
    if ranks.rank:
        return
    with replaced(work / "audit.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"victims {work}/*.jsonl, everything {work / 'audit.json'}", file=sys.stderr)
