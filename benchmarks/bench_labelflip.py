"""Label-flip certificates: the bound against NumPy and mpmath, whole test sets, torch's exponentials beside it.

Synthetic features of the sizes of MNIST 1/7 (13 007 labels, 2 163 test points) and MNIST (60 000 and 10 000).

Attacks a point with 50 and 1280 features:   python -m benchmarks.bench_labelflip attack [MNIST_DIR CIFAR10.npz]
Rules for the ridge parameter, by real data: python -m benchmarks.bench_labelflip ridge MNIST_DIR CIFAR10.npz
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import mpmath
import numpy as np
import torch

from benchmarks.report import medians, record
from pacd_fast import _C, LabelFlipCertifier, ops
from pacd_fast.data import as_float, load_dataset
from pacd_fast.labelflips import (
    LogisticAttack,
    kmeans_patches,
    load_features,
    network_features,
    pca,
    random_convolutions,
    train_feature_network,
)

Q = 0.1


def problem(n: int, m: int, k: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian classes: features [n, k], labels [n], test features [m, k]."""
    generator = torch.Generator().manual_seed(0)
    centres = spread * torch.randn(classes, k, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (n,), generator=generator)
    truth = torch.randint(0, classes, (m,), generator=generator)
    noise = torch.randn(n + m, k, generator=generator, dtype=torch.float64)
    return centres[y] + noise[:n], y, centres[truth] + noise[n:]


def numpy_newton(alpha: np.ndarray, y: np.ndarray, q: float) -> float:
    """The bound of one test point, by Newton's method from mean / variance, without safeguards.

    Sums, not BLAS dot products, whose threads cost more than they save on one row.
    """
    one, zero = np.where(y == 1, 1 - q, q), np.where(y == 1, q, 1 - q)
    squares = alpha * alpha
    t, move = ((alpha * one).sum() - 0.5) / (q * (1 - q) * squares.sum()), np.inf
    while abs(move) > 1e-5 * abs(t):
        e = one * np.exp(-t * alpha)
        w = e / (zero + e)
        move = (0.5 - (alpha * w).sum()) / (squares * (w * (1 - w))).sum()
        t -= move
    return t / 2 + float(np.log(zero + one * np.exp(-t * alpha)).sum())


def exponentials(alpha: np.ndarray, y: np.ndarray, q: float) -> int:
    """Exponentials a label in the operator's solver: one a Halley step (kernels/chernoff.h), and one for the bound."""
    one = np.where(y == 1, 1 - q, q)

    def move(slope: float, bend: float, third: float) -> float:
        plain = -slope / bend
        halley = plain / (1 - 0.5 * plain * third / bend)
        return halley if halley * plain > 0 and abs(halley) < 2 * abs(plain) else plain

    t, steps = 0.0, 0
    while True:
        e = one * np.exp(-t * alpha)
        w = e / (1 - one + e)
        v = w * (1 - w)
        slope, bend, third = (alpha * w).sum() - 0.5, (alpha**2 * v).sum(), (alpha**3 * v * (1 - 2 * w)).sum()
        step = move(-slope, bend, third)
        t += step
        steps += 1  # the first, from t = 0, needs no exponential
        if steps > 1 and abs(step) <= 4e-3 * abs(t):
            return steps


def mpmath_newton(alpha: np.ndarray, y: np.ndarray, q: float, digits: int = 30) -> float:
    with mpmath.workdps(digits):
        a = [mpmath.mpf(float(v)) for v in alpha]
        one = [mpmath.mpf(1 - q) if label else mpmath.mpf(q) for label in y]
        t = (sum(v * p for v, p in zip(a, one, strict=True)) - 0.5) / (q * (1 - q) * sum(v * v for v in a))
        for _ in range(50):
            slope, bend = mpmath.mpf("-0.5"), mpmath.mpf(0)
            for v, p in zip(a, one, strict=True):
                e = p * mpmath.exp(-t * v)
                w = e / (1 - p + e)
                slope += v * w
                bend += v * v * w * (1 - w)
            move = -slope / bend
            t -= move
            if abs(move) <= 1e-5 * abs(t):
                break
        return float(t / 2 + sum(mpmath.log(1 - p + p * mpmath.exp(-t * v)) for v, p in zip(a, one, strict=True)))


def bound(device: str) -> list[dict[str, Any]]:
    x, y, test = problem(13_007, 2163, 50, 2, 0.35)
    alpha = LabelFlipCertifier(Q).fit(x, y).influences(test)
    rows, labels = alpha.numpy(), y.numpy()
    here, there = alpha.to(device), y.to(device)
    threads = torch.get_num_threads()
    together = medians({"ours": lambda: ops.chernoff_newton(here, there, Q)}, rounds=7)["ours"] / len(rows)
    torch.set_num_threads(1)  # as the peers
    few = rows[:20]
    times = medians(
        {
            "ours": lambda: ops.chernoff_newton(here, there, Q),
            "numpy": lambda: [numpy_newton(r, labels, Q) for r in few],
        },
        rounds=7,
    )
    start = time.perf_counter()
    mpmath_newton(rows[0], labels, Q)
    slow = time.perf_counter() - start
    passes = float(np.mean([exponentials(r, labels, Q) for r in few]))
    block = -torch.rand(4096, dtype=torch.float64, device=device)
    out = torch.empty_like(block)
    one_exp = medians({"exp": lambda: [torch.exp(block, out=out) for _ in range(100)]}, rounds=9)["exp"] / 100 / 4096
    torch.set_num_threads(threads)
    ours = times["ours"] / len(rows)
    exponential = 13_007 * passes * one_exp
    points = [
        (f"pacd_fast, {threads} threads" if device == "cpu" else "pacd_fast", together),
        ("NumPy Newton, vectorised", times["numpy"] / 20),
        ("mpmath Newton, 30 digits", slow),
    ]
    if device == "cpu":
        points.insert(1, ("pacd_fast, one thread", ours))
        points.append((f"torch.exp alone, {passes:.1f} times a label ({one_exp * 1e9:.2f} ns each)", exponential))
    return [
        {
            "one test point, 13 007 labels": name,
            "us": 1e6 * s,
            "ns a label": 1e9 * s / 13_007,
            "times ours": s / together,
        }
        for name, s in points
    ]


def test_sets(device: str) -> list[dict[str, Any]]:
    found = []
    x, y, test = problem(13_007, 2163, 50, 2, 0.35)
    certifier = LabelFlipCertifier(Q).fit(x.to(device), y.to(device))
    there = test.to(device)
    for what, names in (("exact", ("exact",)), ("all four certificates", ("kl", "exact", "whitebox", "ridge"))):
        seconds = medians({what: lambda names=names: certifier.certify_all(there, names)}, rounds=5)[what]
        found.append({"a whole test set": f"2 163 x 13 007, 2 classes: {what}", "s": seconds, "peak GiB": "-"})
    child = [sys.executable, "-m", "benchmarks.bench_labelflip", "ten", device]
    ten = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    found.append(
        {"a whole test set": "10 000 x 60 000, 10 classes, 9 pairs each: exact", "s": ten[0], "peak GiB": ten[1]}
    )
    for classes in (2, 10):
        seconds = medians({"table": lambda classes=classes: _C.flip_table(Q, classes, 60_000)}, rounds=3)["table"]
        found.append(
            {"a whole test set": f"flip table, {classes} classes, r = 0..60 000", "s": seconds, "peak GiB": "-"}
        )
    return found


def ten_classes(device: str) -> tuple[float, float]:
    """Seconds and peak resident GiB of fit and certify, in a process of its own."""
    x, y, test = problem(60_000, 10_000, 30, 10, 0.5)
    start = time.perf_counter()
    LabelFlipCertifier(Q).fit(x.to(device), y.to(device)).certify(test.to(device))
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def attacks(mnist: str = "", cifar10: str = "") -> list[dict[str, Any]]:
    """CPU seconds a test point of the attack on logistic regression: 1 280 features, and their first 50 components."""
    x, y, test = problem(1800, 64, 1280, 2, 0.06)
    problems = {"2 Gaussians, 0.06 apart": (x, y, test)}
    if cifar10:
        found = ridge_problems(mnist, cifar10)
        problems |= {name: found[name][:3] for name in found if "1280" in name and len(found[name][0]) == 1800}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for name, (x, y, test) in problems.items():
        x, test = x.double(), test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:64]].double()
        few = pca(x, 50, whiten=False)
        seconds: dict[int, list[float]] = {50: [], 1280: []}
        for _ in range(3):  # in turn, so that a slow moment hits both
            for features, points, training in ((50, few(test), few(x)), (1280, test, x)):
                attack = LogisticAttack(training, y)
                began = time.process_time()
                found_flips = dict(attack.flips(points))
                seconds[features].append((time.process_time() - began) / len(found_flips))
        small, wide = (sorted(s)[1] for s in seconds.values())
        rows.append({"attack on logistic regression": name, "50 features, CPU s a point": small})
        rows[-1] |= {"1280 features": wide, "times (features: 25.6)": wide / small}
        print(rows[-1], flush=True)
    torch.set_num_threads(threads)
    return rows


Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ridge_problems(mnist: str, cifar10: str) -> dict[str, Problem]:
    """Narrow and wide features with their labels: X, y, test X, test y."""
    found: dict[str, Problem] = {}

    def of(name: str, features: str, dim: int) -> Problem:
        data = load_features(name, features, dim, data_dir=mnist)
        return tuple(map(torch.from_numpy, (data.x_train, data.y_train, data.x_test, data.y_test)))  # type: ignore[return-value]

    def mapped(features: Any, images: Any, n: int, pair: bool) -> Problem:
        parts: list[torch.Tensor] = []
        for part in ("train", "test"):
            x, y = images.split(part)
            if pair:
                x, y = x[(y == 1) | (y == 7)], (y[(y == 1) | (y == 7)] == 7).long()
            parts += [features(as_float(x[:n])).double(), y[:n]]
        scale = parts[0].std(0)
        scale[scale == 0] = 1.0
        return parts[0] / scale, parts[1], parts[2] / scale, parts[3]

    found["MNIST 1/7, network 50"] = of("mnist17", "network", 50)
    found["MNIST, ICA 30"] = of("mnist", "ica", 30)
    digits, pictures = load_dataset("mnist", data_dir=mnist), load_dataset(cifar10)
    others = (digits.y_train != 1) & (digits.y_train != 7)
    network = train_feature_network(as_float(digits.x_train[others]), digits.y_train[others], dim=1280, epochs=2)
    found["MNIST 1/7, network 1280"] = mapped(lambda x: network_features(network, x), digits, 1800, True)
    convolutions = random_convolutions(1, 1280)
    found["MNIST 1/7, random convolutions 1280"] = mapped(convolutions, digits, 1800, True)
    found["MNIST, random convolutions 1280"] = mapped(convolutions, digits, 5000, False)
    patches = kmeans_patches(as_float(pictures.x_train[:5000]), 320, stride=2, patches=100_000)
    found["CIFAR-10 car/horse, k-means 1280"] = mapped(patches, pictures, 1800, True)
    found["CIFAR-10, k-means 1280"] = mapped(patches, pictures, 10_000, False)
    for name, n, k, classes, spread, decay in (
        ("2 Gaussians, 50", 13_007, 50, 2, 0.35, 0.0),
        ("2 Gaussians, 1280", 1800, 1280, 2, 0.1, 0.0),
        ("2 Gaussians, 1280 falling", 1800, 1280, 2, 0.3, 1.0),
    ):
        x, y, test = problem(n + 600, 0, k, classes, spread)
        x = x * torch.arange(1, k + 1).double() ** -decay
        found[name] = x[:n], y[:n], x[n:], y[n:]
    return found


def freedoms(x: torch.Tensor, classes: int) -> dict[str, float]:
    """Effective degrees of freedom by rules that read no label."""
    n = len(x)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    kept = values > 1e-13 * len(values) * values[-1]
    values, axes = values[kept], x @ vectors[:, kept] / values[kept].sqrt()
    share = values / values.sum()

    def freedom(l2: float) -> float:
        return float((values / (values + l2)).sum())

    def largest(l2: float) -> float:
        return float((axes * axes @ (values / (values + l2))).max())

    most = 2 * len(values) / 3
    grid = torch.logspace(-7, 2, 200).double() * float(values[-1])
    leverage = next((freedom(float(l2)) for l2 in grid if largest(float(l2)) <= 0.1), 1.0)
    # Held out, without labels: one random half of the features predicts the other, by generalised cross-validation.
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    a, b = x[:, order[: len(order) // 2]], x[:, order[len(order) // 2 :]]
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    explained, total = ((u.T @ b) ** 2).sum(1), (b**2).sum()
    keep = s**2 / (s**2 + grid[:, None])
    error = (total - explained.sum() + ((1 - keep) ** 2) @ explained) / (1 - (keep.sum(1) + 1) / n) ** 2
    return {
        "2/3 of the features": most,
        "held-out features": min(most, freedom(2 * float(grid[int(error.argmin())]))),
        "2/3 of the effective rank": 2 / 3 * float((-share * share.log()).sum().exp()),
        "largest leverage 0.1": min(most, leverage),
        "sqrt(n)": min(most, n**0.5),
        "n / 20": min(most, n / 20),
        "auto": min(most, max(n**0.5, n / 40)),
    }


def ridge(mnist: str, cifar10: str) -> list[dict[str, Any]]:
    """Accuracy and median flips (exact, without smoothing) by rule, and the l2 with the most flips by the labels."""
    rows = []
    for name, (x, y, test, truth) in ridge_problems(mnist, cifar10).items():
        test, truth = test[:600], truth[:600]
        first = LabelFlipCertifier(Q, certificate="ridge").fit(x, y)

        def measured(
            freedom: float, first: Any = first, test: Any = test, truth: Any = truth
        ) -> tuple[float, float, str]:
            certifier = first.adjusted(freedom=min(freedom, first.varying_features_ * 0.999))
            found = certifier.certify(test)
            right = found.prediction == truth
            mean = float(torch.where(right, found.flips, 0).double().mean())
            median = float(np.median(found.flips.numpy()))
            return mean, median, f"{freedom:.3g}: {float(right.double().mean()):.3f}, {median:g}"

        path = [measured(float(f)) for f in np.geomspace(1, first.varying_features_ * 0.9, 14)]
        row = {"degrees of freedom: accuracy, median flips": f"{name}, n = {len(x)}"}
        row |= {rule: measured(f)[2] for rule, f in freedoms(x, first.classes_).items()}
        rows.append({**row, "most flips (reads labels)": max(path)[2]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() and ops.cuda_library == "loaded" else ("cpu",):
        record("label flips", bound(device), device)
        record("label flips, test sets", test_sets(device), device)
    record("label flips, attack", attacks())


if __name__ == "__main__":
    if sys.argv[1:2] == ["ten"]:
        print(json.dumps(ten_classes(sys.argv[2])))
    elif sys.argv[1:2] == ["attack"]:
        record("label flips, attack", attacks(*sys.argv[2:]))
    elif sys.argv[1:2] == ["ridge"]:
        record("label flips, ridge parameter", ridge(sys.argv[2], sys.argv[3]))
    else:
        main()
