"""Victims on disk: a network trained by one method with the papers' settings, and what it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pacd_fast import checkpoints, models, training
from pacd_fast.datasets import Dataset
from pacd_fast.losses import METHODS, Loss
from pacd_fast.unfinished import AnotherRun

__all__ = ["hyperparameters", "loss_of", "network_for", "numbered", "train"]


def hyperparameters() -> dict[str, tuple[type, str]]:
    """All hyperparameters of all methods: name -> (int or float, the methods that have it with their defaults)."""
    found: dict[str, tuple[type, str]] = {}
    for method, kind in METHODS.items():
        for field in dataclasses.fields(kind):
            default = "" if field.default is dataclasses.MISSING else f" {field.default:g}"
            number = int if str(field.type) == "int" else float
            before = f"{found[field.name][1]}, " if field.name in found else ""
            found[field.name] = (number, f"{before}{method}{default}")
    return found


def loss_of(method: str, data_name: str, given: Mapping[str, Any]) -> Loss:
    """The loss of a method: what is given, else the papers' settings for the data set (PACD, appendix E.3).

    given: hyperparameters by name.  sigma is 0.5 by default.  lam of MACER is 16, and on CIFAR-10 12 up to sigma 0.25
    and 4 above.

    Raises ValueError for an unknown method, a hyperparameter that it does not have, or one out of range.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: give {', '.join(METHODS)}")
    names = [field.name for field in dataclasses.fields(METHODS[method])]
    for name in given:
        if name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise ValueError(f"{name} is no hyperparameter of {method}: {has}")
    chosen = dict(given)
    if "sigma" in names:
        chosen.setdefault("sigma", 0.5)
    if method == "macer" and data_name == "cifar10":
        chosen.setdefault("lam", 12.0 if chosen["sigma"] <= 0.25 else 4.0)
    loss: Loss = METHODS[method](**chosen)
    return loss


def numbered(path: str | Path, seed: int) -> Path:
    """The file of one of several seeds: model.safetensors -> model-3.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{seed}{path.suffix}")


def network_for(model: str, data: Dataset) -> nn.Module:
    """A network as `models.build` makes it, for these images; behind CIFAR-10's normalisation where they are those."""
    mean, std = (models.CIFAR10_MEAN, models.CIFAR10_STD) if data.name == "cifar10" else (None, None)
    return models.build(
        model,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        mean=mean,
        std=std,
    )


def train(
    out: str | Path,
    data: Dataset,
    method: str,
    given: Mapping[str, Any],
    *,
    model: str | None = None,
    epochs: int = 100,
    batch_size: int = 200,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    drops: Sequence[int] = (),
    augment: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    microbatch: int | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    metrics: str | Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Trains a victim from scratch and writes it to `out`; while it trains, `out`.partial holds the last epoch.

    Args:
        method, given: see `loss_of`.
        model: a name that `models.build` takes; by default resnet20 for CIFAR-10, else mnist-cnn.
        augment: by default for CIFAR-10 (not for SmoothAdv), as in the papers.
        resume: go on from `out`.partial; where `out` is there already and was trained so, it is returned as it is.
        the rest: as for `training.fit`.

    Raises ValueError and OSError, each one line that says what to do.
    """
    out = Path(out)
    cifar = data.name == "cifar10"
    model = ("resnet20" if cifar else "mnist-cnn") if model is None else model
    augment = (cifar and method != "smoothadv") if augment is None else augment
    loss = loss_of(method, data.name, given)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), not {seed}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist; create it first")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    metadata = {
        "architecture": model,
        "num_classes": str(data.num_classes),
        "in_channels": str(data.in_channels),
        "image_size": "x".join(map(str, data.image_size)),
        "sigma": repr(float(getattr(loss, "sigma", 0.0))),
        "data": f"{data.name}@{data.fingerprint}",
        "method": method,
        "loss": str(loss),
        "training_images": str(len(data.x_train)),
        "epochs": str(epochs),
        "batch_size": str(batch_size),
        "lr": repr(lr),
        "weight_decay": repr(weight_decay),
        "optimizer": optimizer,
        "drops": " ".join(map(str, drops)),
        "augment": str(augment),
        "dtype": str(dtype).removeprefix("torch."),
        "microbatch": str(microbatch),
        "seed": str(seed),
    }
    if resume and out.exists():
        done = checkpoints.load(out, arch=model)
        for key, value in metadata.items():
            if (before := done.metadata.get(key, "")) != value:
                raise AnotherRun(
                    f"{out} is of another run: {key} is {before or 'none'} there and {value or 'none'} here; "
                    "choose another --out or delete it"
                )
        return done.model.to(device)
    torch.manual_seed(seed)
    network = network_for(model, data).to(device)
    partial = out.with_name(out.name + ".partial")
    training.fit(
        network,
        data,
        loss,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        drops=drops,
        augment=augment,
        seed=seed,
        dtype=dtype,
        microbatch=microbatch,
        checkpoint=partial,
        resume=resume,
        metrics=metrics,
        progress=progress,
    )
    checkpoints.save(out, network, metadata)
    partial.unlink(missing_ok=True)
    return network
