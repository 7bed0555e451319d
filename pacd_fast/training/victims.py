"""Victims on disk: a network trained by one method with the papers' settings, and what it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pacd_fast.arguments import DTYPES, option, seed_in_range, writable
from pacd_fast.data import Dataset
from pacd_fast.files import AnotherRun, partial
from pacd_fast.networks import BUILT_IN, CIFAR10_MEAN, CIFAR10_STD, build, load_checkpoint, save_checkpoint
from pacd_fast.randomness import seeded
from pacd_fast.ranks import Ranks
from pacd_fast.training.loop import OPTIMIZERS, fit
from pacd_fast.training.losses import METHODS, Loss

NETWORKS = f"{', '.join(BUILT_IN)} or package.module:function"


def hyperparameters() -> dict[str, tuple[type, str]]:
    """All hyperparameters of all methods: name -> (int or float, the methods that have it with their defaults)."""
    found: dict[str, tuple[type, str]] = {}
    for method, kind in METHODS.items():
        for each in dataclasses.fields(kind):
            default = "" if each.default is dataclasses.MISSING else f" {each.default:g}"
            number = int if str(each.type) == "int" else float
            before = f"{found[each.name][1]}, " if each.name in found else ""
            found[each.name] = (number, f"{before}{method}{default}")
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
    """A network as `build` makes it, for these images; behind CIFAR-10's normalisation where they are those."""
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if data.name == "cifar10" else (None, None)
    return build(
        model,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        mean=mean,
        std=std,
    )


@dataclass(frozen=True)
class Training:
    """How a victim is trained from scratch: `fit`'s settings, the method and its hyperparameters, the network.

    Attributes:
        method, hyperparameters: see `loss_of`; hyperparameters are those that are not the papers'.
        model: a name that `networks.build` takes; by default resnet20 for CIFAR-10, else mnist-cnn.
        augment: random flip and pad-4 crop; by default for CIFAR-10 (not for SmoothAdv), as in the papers.
        dtype: float32, or bfloat16 for the network's passes; weights keep 32 bits.
        The rest: see `fit`.
    """

    method: str = option("gaussian", "training loss", choices=tuple(METHODS))
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = option(None, f"{NETWORKS}; by default mnist-cnn, and resnet20 for cifar10")
    epochs: int = option(100, "passes over the training images")
    batch_size: int = option(200, "images of a step")
    microbatch: int | None = option(None, "images of a batch at a time, to save memory")
    lr: float = option(1e-3, "learning rate")
    drops: tuple[int, ...] = option(
        (), "epochs, counted from 0, from which on the rate is a tenth of what it was", metavar="EPOCH"
    )
    optimizer: str = option("adam", "momentum is SGD with momentum 0.9", choices=OPTIMIZERS)
    weight_decay: float = option(0.0, "the optimiser's l2 term")
    augment: bool | None = option(None, "random flip and pad-4 crop; by default for cifar10, but not with smoothadv")
    dtype: str = option("float32", "of the network's passes; weights keep 32 bits", choices=DTYPES)

    def resolved(self, data: Dataset) -> tuple[str, bool, Any]:
        """The network's name, whether images are augmented, and the loss, for these data.

        Raises ValueError for a method or hyperparameters that are not there.
        """
        cifar = data.name == "cifar10"
        model = ("resnet20" if cifar else "mnist-cnn") if self.model is None else self.model
        augment = (cifar and self.method != "smoothadv") if self.augment is None else self.augment
        return model, augment, loss_of(self.method, data.name, self.hyperparameters)

    def metadata(self, data: Dataset, seed: int) -> dict[str, str]:
        """What a victim's checkpoint says about it."""
        model, augment, loss = self.resolved(data)
        return {
            "architecture": model,
            "num_classes": str(data.num_classes),
            "in_channels": str(data.in_channels),
            "image_size": "x".join(map(str, data.image_size)),
            "sigma": repr(float(getattr(loss, "sigma", 0.0))),
            "data": f"{data.name}@{data.fingerprint}",
            "method": self.method,
            "loss": str(loss),
            "training_images": str(len(data.x_train)),
            "epochs": str(self.epochs),
            "batch_size": str(self.batch_size),
            "lr": repr(self.lr),
            "weight_decay": repr(self.weight_decay),
            "optimizer": self.optimizer,
            "drops": " ".join(map(str, self.drops)),
            "augment": str(augment),
            "dtype": self.dtype,
            "microbatch": str(self.microbatch),
            "seed": str(seed),
        }


def train(
    out: str | Path,
    data: Dataset,
    settings: Training,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    metrics: str | Path | None = None,
    progress: bool = False,
    group: Any = None,
) -> nn.Module:
    """Trains a victim from scratch and writes it to `out`; while it trains, `out`.partial holds the last epoch.

    Args:
        seed: of the initial weights, the order of the images, augmentation and noise.
        resume: go on from `out`.partial; where `out` is there already and was trained so, it is returned as it is.
        metrics, group: see `fit`; rank 0 writes `out`, which is there for all when they return.

    Raises ValueError and OSError, each one line that says what to do.
    """
    out = writable(out)
    seed_in_range(seed)
    model, augment, loss = settings.resolved(data)
    metadata = settings.metadata(data, seed)
    unfinished = partial(out)
    if resume and out.exists() and not unfinished.exists():
        done = load_checkpoint(out, arch=model)
        for key, value in metadata.items():
            if (before := done.metadata.get(key, "")) != value:
                raise AnotherRun(
                    f"{out} is of another run: {key} is {before or 'none'} there and {value or 'none'} here; "
                    "choose another --out or delete it"
                )
        return done.model.to(device)
    with seeded(torch.device("cpu"), seed):
        network = network_for(model, data)
    network = network.to(device)
    fit(
        network,
        data,
        loss,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        optimizer=settings.optimizer,
        drops=settings.drops,
        augment=augment,
        seed=seed,
        dtype=getattr(torch, settings.dtype),
        microbatch=settings.microbatch,
        checkpoint=unfinished,
        resume=resume,
        metrics=metrics,
        progress=progress,
        group=group,
    )
    ranks = Ranks.of_group(group)
    if ranks.rank == 0:
        save_checkpoint(out, network, metadata)
        unfinished.unlink(missing_ok=True)
    ranks.everyones("it is there")
    return network
