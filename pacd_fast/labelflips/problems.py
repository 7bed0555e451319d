"""What data to certify: features and labels by name, and their certificates and attacks into a file."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pacd_fast.arguments import at_least
from pacd_fast.data import as_float, load_dataset, open_npz
from pacd_fast.labelflips.attacks import attack_smoothed
from pacd_fast.labelflips.certifier import CERTIFICATES, LabelFlipCertifier
from pacd_fast.labelflips.features import fast_ica, network_features, pca, random_convolutions, train_feature_network
from pacd_fast.labelflips.logistic import LogisticAttack
from pacd_fast.labelflips.patches import kmeans_patches
from pacd_fast.labelflips.results import ATTACKED, UNDEFENDED, FlipFile, Row, Run
from pacd_fast.labelflips.simclr import SimCLR, train_simclr

__all__ = ["DIMENSIONS", "FEATURES", "FeatureData", "certify_data", "load_features", "scan"]

DIMENSIONS = {"network": 50, "ica": 30, "kmeans": 3200, "pca": 30, "random-conv": 128, "simclr": 128, "pixels": None}
FEATURES = tuple(DIMENSIONS)


@dataclass(frozen=True)
class FeatureData:
    """Features float [n, k] and labels of a problem, and a name that says where they are from."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @functools.cached_property
    def tag(self) -> str:
        """name@fingerprint of features and labels."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return f"{self.name}@{digest.hexdigest()[:12]}"

    def save(self, path: str | Path) -> None:
        """An .npz that `load_features` reads: X_train, y_train, X_test, y_test and the name."""
        arrays = {"X_train": self.x_train, "y_train": self.y_train, "X_test": self.x_test, "y_test": self.y_test}
        with open(path, "wb") as file:
            np.savez(file, name=np.array(self.name), **arrays)  # type: ignore[arg-type]


def load_features(
    data: str,
    features: str | None = None,
    dim: int | None = None,
    *,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> FeatureData:
    """The problem of one name.

    ``mnist17``: digits 1 and 7 (labels 0 and 1), by default 50 features of a network trained on the other eight digits.
    ``mnist``, ``cifar10``, ``mnist5k``, or an .npz of images: all classes; by default 30 independent components.  An
    .npz with X_train, y_train, X_test, y_test: features as they are.

    Args:
        features: network (mnist17 only), ica, kmeans (of patches), pca, random-conv, simclr (wants a GPU), pixels.
        dim: how many; by default those of `DIMENSIONS`.
        seed: of what is learnt.
        epochs: of network (4) and simclr (200).
        device: where simclr trains.
        progress: show simclr's.

    Raises:
        ValueError, FileNotFoundError: one line that says what to do.
    """
    if data.endswith(".npz") and (found := _npz_features(data, features)) is not None:
        return found
    pair = data == "mnist17"
    features = features or ("network" if pair else "ica")
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}: give {', '.join(FEATURES)}")
    if features == "network" and not pair:
        raise ValueError(
            "network features are learnt from other classes, which only mnist17 has: use --features kmeans, ica or pca"
        )
    if features == "pixels" and dim is not None:
        raise ValueError("pixels are all of an image's: leave out --dim, or take --features pca")
    if dim is not None:
        at_least("dim", dim, 1)
    dim = DIMENSIONS[features] if dim is None else dim
    source = load_dataset("mnist" if pair else data, data_dir=data_dir, download=download)
    if not pair:
        x_train, y_train, x_test, y_test = source.x_train, source.y_train, source.x_test, source.y_test
    else:
        chosen, chosen_test = ((y == 1) | (y == 7) for y in (source.y_train, source.y_test))
        x_train, x_test = source.x_train[chosen], source.x_test[chosen_test]
        y_train, y_test = (source.y_train[chosen] == 7).long(), (source.y_test[chosen_test] == 7).long()
    train, test = as_float(x_train), as_float(x_test)
    if features == "network":
        others, labels = as_float(source.x_train[~chosen]), source.y_train[~chosen]
        network = train_feature_network(others, labels, dim=dim or 1, epochs=epochs or 4, seed=seed)
        maps = network_features(network, train), network_features(network, test)
    elif features == "simclr":
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        settings = SimCLR(epochs=epochs or 200, dtype=dtype)
        encoder = train_simclr(train.to(device), settings, seed=seed, progress=progress)
        raw = [network_features(encoder, x.to(device)).cpu() for x in (train, test)]
        fewer = pca(raw[0], dim or 1, whiten=False)
        maps = fewer(raw[0]), fewer(raw[1])
    else:
        maps = _unsupervised(features, train, test, dim or 1, seed)
    name = f"{source.name if data.endswith('.npz') else data}-{features}{dim or ''}"
    return FeatureData(name, maps[0].numpy(), y_train.numpy(), maps[1].numpy(), y_test.numpy())


def _unsupervised(features: str, train: Tensor, test: Tensor, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features that are learnt from the training images alone, without labels, or not at all."""
    if features == "kmeans":
        if dim % 4:
            raise ValueError(f"kmeans has four features for every centroid: dim must be a multiple of 4, not {dim}")
        patches = kmeans_patches(train, dim // 4, seed=seed)
        raw = patches(train)
        deviation = raw.std(0)
        deviation[deviation == 0] = 1.0
        return raw.div_(deviation), patches(test).div_(deviation)
    if features == "random-conv":
        fixed = random_convolutions(train.shape[1], 1024, seed=seed)
        train, test = fixed(train), fixed(test)
    else:
        train, test = train.flatten(1), test.flatten(1)
    if features == "pixels":
        return train.double(), test.double()
    learnt = fast_ica(train, dim, seed=seed) if features == "ica" else pca(train, dim)
    return learnt(train), learnt(test)


def _npz_features(path: str, features: str | None) -> FeatureData | None:
    """The features in an .npz file; None where it holds images (x_train) instead."""
    keys = ("X_train", "y_train", "X_test", "y_test")
    with open_npz(path) as file:
        file.look((*keys, "name", "x_train"))
        names = set(file.declared)
        if "x_train" in names and "X_train" not in names:
            return None
        arrays = [file.read(key) for key in keys if key in names]
        name = str(file.read("name")) if "name" in names else Path(path).stem
    if missing := [key for key in keys if key not in names]:
        raise ValueError(f"{path} has no {', '.join(missing)}: save features as {', '.join(keys)}")
    if features is not None:
        raise ValueError(f"{path} holds features already: leave out --features")
    for i in (0, 2):
        if arrays[i].dtype.kind not in "biuf" or arrays[i].ndim != 2 or not np.isfinite(arrays[i]).all():
            raise ValueError(f"{path}: {keys[i]} must be finite numbers [points, features]")
    for i in (1, 3):
        labels, whole = arrays[i], arrays[i].dtype.kind in "iub"
        if labels.dtype.kind == "f":
            with np.errstate(over="ignore"):  # of a longdouble
                labels = labels.astype(np.float64)  # float16 ends at 65504
            whole = np.array_equal(labels, np.round(labels))
        if not whole or labels.ndim != 1 or (labels < 0).any() or (labels >= 2**31).any():
            raise ValueError(f"{path}: {keys[i]} must be whole numbers, 0 and up, one per point")
        arrays[i] = labels.astype(np.int64)
        if len(arrays[i - 1]) != len(arrays[i]):
            raise ValueError(f"{path}: {keys[i - 1]} has {len(arrays[i - 1])} points and {keys[i]} {len(arrays[i])}")
    return FeatureData("".join(c if c.isprintable() and c not in '@"' else "_" for c in name[:100]) or "_", *arrays)


def certify_data(
    data: FeatureData,
    out: str | Path,
    qs: Sequence[float] = (0.1,),
    certificates: Sequence[str] = CERTIFICATES,
    *,
    l2: str | float = "auto",
    freedom: float | None = None,
    intercept: bool = True,
    points: int | None = None,
    attack: int = 0,
    seed: int = 0,
    memory_budget: int = 256 * 2**20,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> int:
    """Writes a row for every test point, q and certificate (``"ridge"`` has no q: once, as q = 0) to the file `out`.

    Rows are written as they are done; rows that are in the file, of an earlier call that was killed or asked for less,
    are not computed again.

    Args:
        points: certify the first so many test points, by default all.
        attack: attack so many random points of these as well.  Their rows have certificate ``"attacked"`` (the
            smoothed classifier of that q) and ``"undefended"`` (logistic regression, two classes only), and the most
            flips for which the attack did not succeed: upper bounds, not certificates.
        seed: of the choice of attacked points.

    Returns:
        How many rows were in the file already.

    Raises:
        ValueError, FileNotFoundError: see `FlipFile` and `LabelFlipCertifier`.
    """
    x_train, x_test = (torch.as_tensor(x, device=device) for x in (data.x_train, data.x_test))
    y_train = torch.as_tensor(data.y_train, device=device)
    first = LabelFlipCertifier(qs[0], l2, intercept=intercept, memory_budget=memory_budget, freedom=freedom).fit(
        x_train, y_train
    )
    if len(data.y_test) and data.y_test.max() >= first.classes_:
        raise ValueError(f"a test label is {data.y_test.max()}, but training labels end at {first.classes_ - 1}")
    certifiers = [first, *(first.adjusted(q=q) for q in qs[1:])]
    majority = int(np.bincount(data.y_train).argmax())
    run = Run(first.classes_, len(data.y_train), majority, intercept, data.tag)
    everything = np.arange(len(data.y_test))[:points]
    chosen = np.random.default_rng(seed).permutation(everything)[:attack]
    with FlipFile(out, run) as file:
        before = len(file.done)
        for certifier in certifiers:
            for name in (*certificates, *([ATTACKED] if attack else [])):
                if name != "ridge":
                    file.same_l2(name, certifier.q, certifier.l2_, certifier.conditional_)
        if "ridge" in certificates:
            file.same_l2("ridge", 0.0, first.l2_, first.conditional_)
        _certify(file, certifiers, certificates, x_test, data.y_test, everything, progress)
        _attack(file, certifiers, x_train, y_train, x_test, data.y_test, chosen, progress)
    return before


def scan(
    data: FeatureData,
    q: float = 0.1,
    certificate: str = "exact",
    *,
    points: int | None = None,
    intercept: bool = True,
    memory_budget: int = 256 * 2**20,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[dict[str, str]]:
    """Accuracy and certified flips over a grid of effective degrees of freedom, a row of a table each.

    The grid reads no label: 2, 5, 10, ... up to two thirds of the features, and what ``l2="auto"`` takes.
    """
    x_train, x_test = (torch.as_tensor(x, device=device) for x in (data.x_train, data.x_test[:points]))
    automatic = LabelFlipCertifier(q, certificate=certificate, intercept=intercept, memory_budget=memory_budget)
    automatic.fit(x_train, torch.as_tensor(data.y_train, device=device))
    most = 2 * automatic.varying_features_ / 3
    grid = [float(step * 10**power) for power in range(7) for step in (1, 2, 5)]
    grid = [value for value in (*grid, most) if 2 <= value <= most]
    grid = sorted([*(v for v in grid if not math.isclose(v, automatic.freedom_, rel_tol=1e-6)), automatic.freedom_])
    rows = []
    for freedom in tqdm(grid, unit="value", desc="scan", disable=not progress, delay=1):
        same = freedom == automatic.freedom_
        certifier = automatic if same else automatic.adjusted(freedom=freedom)
        found = certifier.certify(x_test.cpu().numpy())
        rows.append(
            {
                "freedom": f"{freedom:.4g}" + (" (auto)" if same else ""),
                "l2": f"{certifier.l2_:.4g}",
                "accuracy": f"{found.certified_accuracy(data.y_test[:points], 0):.4f}",
                "median": f"{np.median(found.flips):g}",
                **{str(r): f"{found.certified_accuracy(data.y_test[:points], r):.3f}" for r in (1, 10, 50, 100, 500)},
            }
        )
    return rows


def _certify(
    file: FlipFile,
    certifiers: Sequence[LabelFlipCertifier],
    certificates: Sequence[str],
    x_test: Tensor,
    y_test: np.ndarray,
    points: np.ndarray,
    progress: bool,
) -> None:
    """The rows of certificates that are not in the file, tile by tile, influences computed once for all q."""
    wanted = [
        (certifier, name, 0.0 if name == "ridge" else float(certifier.q))
        for certifier in certifiers
        for name in certificates
        if name != "ridge" or certifier is certifiers[0]
    ]
    first = certifiers[0]
    rows = max(1, min(first.memory_budget // (8 * file.run.n), 256))
    # Whole tiles, because a matrix product's last bits depend on its size: a run that was stopped gets equal rows.
    tiles = [points[begin : begin + rows].tolist() for begin in range(0, len(points), rows)]
    tiles = [tile for tile in tiles if any((name, q, i) not in file.done for _, name, q in wanted for i in tile)]
    bar = tqdm(total=sum(map(len, tiles)), unit="point", desc="certify", disable=not progress or not tiles, delay=1)
    for tile in tiles:
        x = x_test[torch.tensor(tile, device=x_test.device)]
        alpha = first.influences(x)
        for certifier in certifiers:
            mine = [(name, q) for other, name, q in wanted if other is certifier]
            names = [name for name, q in mine if any((name, q, i) not in file.done for i in tile)]
            shared = alpha if certifier.l2_ == first.l2_ else None
            for name, found in certifier.certify_all(x, names, shared).items() if names else ():
                q = dict(mine)[name]
                values = (v.tolist() for v in (found.prediction, found.flips, found.log_tail))
                file.append(
                    Row(i, int(y_test[i]), predict, flips, tail, name, q, certifier.l2_, found.conditional)
                    for i, predict, flips, tail in zip(tile, *values, strict=True)
                    if (name, q, i) not in file.done
                )
        bar.update(len(tile))
    bar.close()


def _attack(
    file: FlipFile,
    certifiers: Sequence[LabelFlipCertifier],
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: np.ndarray,
    points: np.ndarray,
    progress: bool,
) -> None:
    """The rows of attacks that are not in the file, each as it is done."""
    n, labels, done = len(y_train), y_train.cpu().numpy(), file.done
    todo = [(i, c) for i in points.tolist() for c in certifiers if (ATTACKED, float(c.q), i) not in done]
    plain = [i for i in points.tolist() if file.run.classes == 2 and (UNDEFENDED, 0.0, i) not in done]
    bar = tqdm(total=len(todo) + len(plain), unit="attack", desc="attack", disable=not progress, delay=1)
    for i, certifier in todo:
        x, q = x_test[i : i + 1], float(certifier.q)
        attacked = attack_smoothed(certifier.influences(x)[0], y_train, q, certifier.classes_)
        flips = n if attacked is None else int((attacked != labels).sum()) - 1
        predict, l2, conditional = int(certifier.predict(x)[0]), certifier.l2_, certifier.conditional_
        file.append([Row(i, int(y_test[i]), predict, flips, float("nan"), ATTACKED, q, l2, conditional)])
        bar.update()
    if plain:
        logistic = LogisticAttack(x_train, y_train)
        for index, needed in logistic.flips(x_test[i] for i in plain):
            i = plain[index]
            predict, flips = logistic.predict(x_test[i]), n if needed < 0 else needed - 1
            file.append([Row(i, int(y_test[i]), predict, flips, float("nan"), UNDEFENDED, 0.0, 0.0, False)])
            bar.update()
    bar.close()
