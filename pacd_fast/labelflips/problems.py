"""Label-flip experiments for the command line: features, certificates and attacks on them, the paper's tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pacd_fast import datasets
from pacd_fast.labelflips.attacks import attack_logistic, attack_smoothed
from pacd_fast.labelflips.certifier import CERTIFICATES, LabelFlipCertifier
from pacd_fast.labelflips.features import fast_ica, network_features, pca, random_convolutions, train_feature_network
from pacd_fast.labelflips.results import ATTACKED, UNDEFENDED, Curve, draw, read, table, write
from pacd_fast.losses import at_least
from pacd_fast.presets import device_of

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
    source = datasets.load("mnist" if pair else data, data_dir=data_dir, download=download)
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
            datasets.as_float(images["train"][~keep["train"]]),
            labels["train"][~keep["train"]],
            dim=dim,
            epochs=epochs,
            seed=seed,
        )
        maps = {part: network_features(network, datasets.as_float(x)) for part, x in chosen.items()}
    elif features in ("ica", "pca"):
        flat = {part: datasets.as_float(x).flatten(1) for part, x in chosen.items()}
        learn = fast_ica(flat["train"], dim, seed=seed) if features == "ica" else pca(flat["train"], dim)
        maps = {part: learn(x) for part, x in flat.items()}
    elif features == "random-conv":
        fixed = random_convolutions(source.in_channels, 1024, seed=seed)
        raw = {part: fixed(datasets.as_float(x)) for part, x in chosen.items()}
        learn = pca(raw["train"], dim)
        maps = {part: learn(x) for part, x in raw.items()}
    elif features == "pixels":
        maps = {part: datasets.as_float(x).flatten(1).double() for part, x in chosen.items()}
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
    except datasets.UNREADABLE as error:
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


@dataclass(frozen=True)
class Experiment:
    """A figure of the paper: what to certify, and how."""

    data: str
    features: str
    dim: int
    qs: tuple[float, ...]
    title: str
    attack: int = 0
    certificates: tuple[str, ...] = CERTIFICATES


EXPERIMENTS = {
    "flips-mnist17": Experiment("mnist17", "network", 50, (0.1, 0.3, 0.4, 0.45), "MNIST 1/7", attack=50),
    "flips-mnist": Experiment("mnist", "ica", 30, (0.1, 0.3, 0.5), "MNIST, 10 classes", attack=50),
    "flips-cifar10": Experiment(
        "cifar10", "random-conv", 128, (0.05, 0.12), "CIFAR-10, random convolutions", attack=50
    ),
}


def reproduce(
    name: str, out: str | Path, *, data_dir: str | None = None, download: bool = False, seed: int = 0
) -> list[Curve]:
    """Runs an experiment, writes name.tsv, name.md and a picture per certificate into the folder `out`; its curves."""
    experiment, folder = EXPERIMENTS[name], Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    data = load_features(
        experiment.data, experiment.features, experiment.dim, data_dir=data_dir, download=download, seed=seed
    )
    print(
        f"{data.name}: {len(data.x_train)} training and {len(data.x_test)} test points, "
        f"features in {time.perf_counter() - began:.1f} s"
    )
    began = time.perf_counter()
    rows = certify_data(data, experiment.qs, experiment.certificates, attack=experiment.attack, seed=seed)
    print(f"{len(rows)} certificates in {time.perf_counter() - began:.1f} s")
    write(rows, folder / f"{name}.tsv")
    curves = read([folder / f"{name}.tsv"])
    (folder / f"{name}.md").write_text(table(curves) + "\n", encoding="utf-8")
    for certificate in ("exact", "whitebox"):
        shown = [curve for curve in curves if curve.certificate in (certificate, "ridge", UNDEFENDED)]
        draw(shown, folder / f"{name}-{certificate}.png", f"{experiment.title}: {certificate}")
    return curves


# The command line's part.


def add_commands(command: Any) -> None:
    """The command `labelflip`; command(name, run, text) gives a parser."""
    sub: argparse.ArgumentParser = command(
        "labelflip", run_labelflip, "certify predictions against flips of training labels"
    )
    sub.add_argument(
        "--data",
        default="mnist17",
        help=f"mnist17, {', '.join(datasets.NAMES)}, or an .npz with X_train, y_train, X_test, y_test",
    )
    sub.add_argument("--data-dir", help="folder of mnist and cifar10 in torchvision's layout")
    sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    sub.add_argument("--features", choices=FEATURES, help="by default network for mnist17, ica for other images")
    sub.add_argument("--dim", type=int, help="number of features, by default 50 for mnist17, 30 for other images")
    sub.add_argument("--q", type=float, nargs="+", default=[0.1], help="label noise of the smoothing")
    sub.add_argument("--l2", default="auto", help="auto (reads no label), paper (conditional), or a number")
    sub.add_argument("--certificate", nargs="+", choices=CERTIFICATES, default=["exact"])
    sub.add_argument("--no-intercept", action="store_true", help="the paper's classifier: no constant feature")
    sub.add_argument(
        "--attack",
        type=int,
        default=0,
        help="also attack so many test points: the smoothed classifier, and undefended logistic regression",
    )
    sub.add_argument("--max", type=int, help="only the first so many test points")
    sub.add_argument("--memory", type=int, default=256, help="MiB for the influences that are worked on at once")
    sub.add_argument("--seed", type=int, default=0, help="of the features and of the attack's choice")
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--out", required=True, help="certificates to write (.tsv); summary and plot read them")


def run_labelflip(options: argparse.Namespace) -> None:
    l2: str | float = options.l2
    if l2 not in ("auto", "paper"):
        try:
            l2 = float(options.l2)
        except ValueError:
            raise ValueError(f"--l2 must be auto, paper or a number, not {options.l2!r}") from None
    if options.max is not None:
        at_least("--max", options.max, 1)
    at_least("--attack", options.attack, 0)
    at_least("--memory", options.memory, 1)
    device = device_of(options.device)
    if not Path(options.out).parent.is_dir():
        raise FileNotFoundError(f"{options.out}: the folder {Path(options.out).parent} does not exist; create it first")
    data = load_features(
        options.data,
        options.features,
        options.dim,
        data_dir=options.data_dir,
        download=options.download,
        seed=options.seed,
    )
    if options.max is not None:
        data = FeatureData(
            data.name, data.x_train, data.y_train, data.x_test[: options.max], data.y_test[: options.max]
        )
    rows = certify_data(
        data,
        options.q,
        options.certificate,
        l2=l2,
        intercept=not options.no_intercept,
        attack=options.attack,
        seed=options.seed,
        memory_budget=options.memory * 2**20,
        device=str(device),
        progress=True,
    )
    write(rows, options.out)
    print(table(read([options.out])))
    if l2 == "paper":
        print("conditional: l2 was chosen by the paper's rule, which reads the labels that an attacker may change")
