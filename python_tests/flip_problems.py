"""Small label-flip problems and their answers by enumeration, for several test files."""

import numpy as np
import torch

from pacd_fast import _C
from pacd_fast.labelflips.rules import exact_flips, kl_flips, losing_tail


def all_labels(n, classes):
    return np.array(np.unravel_index(np.arange(classes**n), (classes,) * n))  # [n, classes^n]


def base_classifier(alpha, labels, classes):
    sums = np.array([(alpha[:, None] * (labels == c)).sum(0) for c in range(classes)])
    return (sums[1] >= 0.5).astype(int) if classes == 2 else sums.argmax(0)


def smoothed(base, n, classes, q):
    """P(base classifier says c | labels y) for every y, [classes, classes^n], by one small matrix product per label."""
    noise = np.full((classes, classes), q / (classes - 1)) + np.eye(classes) * (1 - q - q / (classes - 1))
    shares = []
    for c in range(classes):
        share = (base == c).astype(float).reshape((classes,) * n)
        for axis in range(n):
            share = np.moveaxis(np.tensordot(noise, share, (1, axis)), 0, axis)
        shares.append(share.reshape(-1))
    return np.array(shares)


def certificates(alpha, y, q, classes):
    """(prediction, flips) of the four certificates for one row of influences, from the certifier's own parts."""
    said, whitebox = (int(v[0]) for v in _C.linear_flips(alpha[None], y, q, classes, True))
    unsmoothed, ridge = (int(v[0]) for v in _C.linear_flips(alpha[None], y, q, classes, False))
    tail = losing_tail(torch.tensor(alpha)[None], torch.tensor(y), torch.tensor([said]), q, classes).numpy()
    kl, exact = int(kl_flips(tail, q, classes, len(y))[0]), int(exact_flips(tail, q, classes, len(y))[0])
    return {"kl": (said, kl), "exact": (said, exact), "whitebox": (said, whitebox), "ridge": (unsmoothed, ridge)}


def problem(seed, n=600, classes=2, k=6, m=12):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, k))
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    truth = rng.integers(0, classes, m)
    return centres[y] + 0.7 * rng.normal(size=(n, k)), y, centres[truth] + 0.7 * rng.normal(size=(m, k)), truth
