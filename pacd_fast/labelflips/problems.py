"""Problems to certify: features and labels of a data set by name, and all that is said about its test points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pacd_fast.data import UNREADABLE, as_float, load_dataset
from pacd_fast.labelflips.attacks import attack_logistic, attack_smoothed
from pacd_fast.labelflips.certifier import LabelFlipCertifier
from pacd_fast.labelflips.features import fast_ica, network_features, pca, random_convolutions, train_feature_network
from pacd_fast.labelflips.results import ATTACKED, UNDEFENDED

FEATURES = ("network", "ica", "pca", "random-conv", "pixels")


@dataclass(frozen=True)
class FeatureData:
    """Features float64 [n, k] and labels of a problem, and a name that says where they are from."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_features(
    data: str,
    features: str | None = None,
    dim: int | None = None,
    *,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
    epochs: int = 4,
) -> FeatureData:
    """The problem of one name.

    ``mnist17``: digits 1 and 7 (labels 0 and 1), by default 50 features of a network trained on the other eight digits.
    ``mnist``, ``cifar10``, ``mnist5k``, or an .npz of images: all classes; by default 30 independent components.  An
    .npz with X_train, y_train, X_test, y_test: features as they are.  `features`: network (mnist17 only), ica, pca,
    random-conv, pixels.

    Raises:
        ValueError, FileNotFoundError: one line that says what to do.
    """
    if data.endswith(".npz") and (found := _npz_features(data, features)) is not None:
        return found
    pair = data == "mnist17"
    source = load_dataset("mnist" if pair else data, data_dir=data_dir, download=download)
    images = {"train": source.x_train, "test": source.x_test}
    labels = {"train": source.y_train, "test": source.y_test}
    features = features or ("network" if pair else "ica")
    dim = dim or (50 if pair else 30)
    keep = {part: (y == 1) | (y == 7) if pair else torch.ones_like(y, dtype=torch.bool) for part, y in labels.items()}
    chosen = {part: images[part][keep[part]] for part in images}
    truth = {part: (labels[part][keep[part]] == 7).long() if pair else labels[part] for part in labels}
    name = f"{data}-{features}{dim}"
    if features == "network":
        if not pair:
            raise ValueError(
                "network features are learnt from other classes, which only mnist17 has: "
                "use --features ica, pca or random-conv"
            )
        network = train_feature_network(
            as_float(images["train"][~keep["train"]]),
            labels["train"][~keep["train"]],
            dim=dim,
            epochs=epochs,
            seed=seed,
        )
        maps = {part: network_features(network, as_float(x)) for part, x in chosen.items()}
    elif features in ("ica", "pca"):
        flat = {part: as_float(x).flatten(1) for part, x in chosen.items()}
        learn = fast_ica(flat["train"], dim, seed=seed) if features == "ica" else pca(flat["train"], dim)
        maps = {part: learn(x) for part, x in flat.items()}
    elif features == "random-conv":
        fixed = random_convolutions(source.in_channels, 1024, seed=seed)
        raw = {part: fixed(as_float(x)) for part, x in chosen.items()}
        learn = pca(raw["train"], dim)
        maps = {part: learn(x) for part, x in raw.items()}
    elif features == "pixels":
        maps = {part: as_float(x).flatten(1).double() for part, x in chosen.items()}
    else:
        raise ValueError(f"unknown features {features!r}: give {', '.join(FEATURES)}")
    return FeatureData(name, maps["train"].numpy(), truth["train"].numpy(), maps["test"].numpy(), truth["test"].numpy())


def _npz_features(path: str, features: str | None) -> FeatureData | None:
    """The features in an .npz file; None where it holds images (x_train) instead."""
    try:
        with np.load(path) as file:
            names = set(file.files)
            if "x_train" in names and "X_train" not in names:
                return None
            keys = ("X_train", "y_train", "X_test", "y_test")
            arrays = [np.asarray(file[key]) for key in keys if key in names]
    except UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not an .npz file that can be read: {error}") from error
    if missing := [key for key in keys if key not in names]:
        raise ValueError(f"{path} has no {', '.join(missing)}: save features as {', '.join(keys)}")
    if features is not None:
        raise ValueError(f"{path} holds features already: leave out --features")
    for i in (1, 3):
        labels = arrays[i]
        whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels)))
        if not whole or labels.ndim != 1 or (labels < 0).any():
            raise ValueError(f"{path}: {keys[i]} must be whole numbers, 0 and up, one per point")
        arrays[i] = labels.astype(np.int64)
    if len(arrays[2]) != len(arrays[3]):
        raise ValueError(f"{path}: X_test has {len(arrays[2])} points and y_test {len(arrays[3])}")
    return FeatureData(Path(path).stem.replace("\t", " "), *arrays)


def certify_data(
    data: FeatureData,
    qs: Sequence[float],
    certificates: Sequence[str],
    *,
    l2: str | float = "auto",
    intercept: bool = True,
    attack: int = 0,
    seed: int = 0,
    memory_budget: int = 256 * 2**20,
    device: str = "cpu",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One row for every test point, q and certificate (``"ridge"`` has no q: once, as q = 0), in the order of COLUMNS.

    attack: so many random test points are attacked too.  Their rows have certificate ``"attacked"`` (the smoothed
    classifier of that q) and ``"undefended"`` (logistic regression, two classes only), and the most flips for which the
    attack did not succeed: upper bounds, not certificates.
    """
    majority = int(np.bincount(data.y_train).argmax())
    shared = {
        "classes": int(data.y_train.max()) + 1,
        "n": len(data.y_train),
        "constant": float(np.mean(data.y_test == majority)),
        "data": data.name,
    }
    rows: list[dict[str, Any]] = []

    def add(
        name: str,
        q: float,
        l2_used: float,
        index: np.ndarray,
        prediction: np.ndarray,
        flips: np.ndarray,
        tail: np.ndarray,
    ) -> None:
        for i, p, r, t in zip(index, prediction, flips, tail, strict=True):
            label = int(data.y_test[i])
            rows.append(
                {
                    "idx": int(i),
                    "label": label,
                    "predict": int(p),
                    "correct": int(p == label),
                    "flips": int(r),
                    "log_tail": repr(float(t)),
                    "certificate": name,
                    "q": repr(float(q)),
                    "l2": repr(l2_used),
                    **shared,
                }
            )

    everything = np.arange(len(data.y_test))
    x_train, x_test = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (data.x_train, data.x_test))
    y_train = torch.as_tensor(data.y_train, device=device)
    chosen = np.random.default_rng(seed).permutation(everything)[:attack]
    bar = tqdm(total=len(qs) * (1 + len(chosen)), unit="step", desc="label flips", disable=not progress, delay=1)
    for k, q in enumerate(qs):
        certifier = LabelFlipCertifier(q, l2, intercept=intercept, memory_budget=memory_budget).fit(x_train, y_train)
        wanted = [name for name in certificates if name != "ridge" or k == len(qs) - 1]
        for name, found in certifier.certify_all(x_test, wanted).items():
            parts = (v.cpu().numpy() for v in (found.prediction, found.flips, found.log_tail))
            add(name, 0.0 if name == "ridge" else q, certifier.l2_, everything, *parts)
        unbroken: list[int] = []
        for i in chosen:
            alpha = certifier.influences(x_test[i : i + 1])[0]
            attacked = attack_smoothed(alpha, y_train, q, certifier.classes_)
            unbroken.append(len(y_train) if attacked is None else int((attacked != data.y_train).sum()) - 1)
            bar.update()
        prediction = certifier.predict(x_test[torch.as_tensor(chosen)]).cpu().numpy()
        add(
            ATTACKED,
            q,
            certifier.l2_,
            chosen,
            prediction,
            np.array(unbroken, dtype=np.int64),
            np.full(len(chosen), np.nan),
        )
        bar.update()
    bar.close()
    if attack and shared["classes"] == 2:
        needed, prediction = attack_logistic(x_train, y_train, x_test[torch.as_tensor(chosen)])
        survived = np.where(needed < 0, len(data.y_train), needed - 1)
        add(UNDEFENDED, 0.0, 0.0, chosen, prediction, survived, np.full(len(chosen), np.nan))
    return rows
