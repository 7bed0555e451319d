"""PREDICT of Cohen et al. 2019, sequentially: the smoothed classifier's class, or abstaining."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacd_fast._C import SequentialPredict
from pacd_fast.arguments import whole
from pacd_fast.certification.classifier import Compile, Model
from pacd_fast.certification.noise import Noise, Numbers
from pacd_fast.certification.question import check_level
from pacd_fast.certification.sampler import Sampler
from pacd_fast.certification.vote import by_sigma, pixels, sampler_of


@dataclass(frozen=True)
class Predictions:
    """What the smoothed classifier says of N images.

    Attributes:
        prediction: int64 [N], its class, -1 where it abstains; wrong with probability at most alpha, one by one.
        samples: int64 [N], samples that were drawn to decide, those that chose the class aside.
        counts: int64 [N, num_classes], their votes.
        seed: what the noise was drawn from.
    """

    prediction: Tensor
    samples: Tensor
    counts: Tensor
    seed: int


def predict(
    model: Model,
    images: Any,
    *,
    num_classes: int,
    sigma: Numbers,
    n0: float = 100,
    n: float = 100_000,
    alpha: float = 0.001,
    futility: float = 1e-6,
    noise: str = "lattice",
    step: Numbers | None = None,
    offset: Numbers | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    compile: Compile = "auto",
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> Predictions:
    """The class of the smoothed classifier g(x) = argmax_c P(f(x + noise) = c), or -1, for a batch of images.

    Per image n0 samples choose a class; as soon as others have shown it to be more probable than every rival, at level
    1 - alpha, it is predicted, and after n of them it abstains.  Images share batches.

    Args:
        futility: a share of at most so many predictions may be lost to giving up on images that are close calls.
        the rest: as for `pacd_fast.certify`.

    Raises ValueError as `pacd_fast.certify` does.
    """
    seed = secrets.randbits(63) if seed is None else seed
    images = pixels(images)
    count = len(images)
    ids = torch.arange(count) if image_ids is None else torch.as_tensor(image_ids)
    found = Predictions(
        torch.full((count,), -1), torch.zeros(count).long(), torch.zeros(count, num_classes).long(), seed
    )
    for level, part in by_sigma(sigma, count):
        sampler, rule = predictor(
            model, images[part], num_classes, Noise.of(noise, level, step, offset), seed, n0, n, alpha, futility,
            dtype=dtype, rows=batch_size, compile=compile, image_ids=ids[part],
        )  # fmt: skip
        for index, outcome, _ in sampler.decide(rule, progress):
            at = part[index]
            found.prediction[at], found.samples[at] = outcome.prediction, outcome.samples
            found.counts[at] = torch.from_numpy(outcome.counts)
    return found


def predictor(
    model: Any,
    images: Any,
    num_classes: int,
    noise: Noise,
    seed: int,
    n0: float,
    n: float,
    alpha: float,
    futility: float,
    **more: Any,
) -> tuple[Sampler, SequentialPredict]:
    """What draws the votes of a prediction, and the rule that decides it.  Raises ValueError."""
    n0, n = whole("n0", n0), whole("n", n)
    if n < 1 or n0 < 1:
        raise ValueError(f"n0 and n must be positive, not {n0} and {n}")
    check_level(n, alpha, 2e-200)
    if not 0 <= futility <= 0.5:
        raise ValueError(f"futility must be in [0, 1/2], not {futility}")
    rule = SequentialPredict(n0, n, alpha, futility)
    return sampler_of(model, images, num_classes, noise, seed, n0 + max(1, n // 10), **more), rule
