"""The smoothed classifier as an object: a drop-in for Cohen et al.'s class."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacd_fast.certification.classifier import BaseClassifier, Compile, Model
from pacd_fast.certification.noise import Noise, Numbers
from pacd_fast.certification.prediction import predictor
from pacd_fast.certification.question import Question, check_level
from pacd_fast.certification.rows import ABSTAIN
from pacd_fast.certification.vote import Certificate, certificates, pixels, sampler_of


class Smooth:
    """A smoothed classifier g(x) = argmax_c P(f(x + N(0, sigma^2 I)) = c): a drop-in for Cohen et al.'s class.

    The base classifier is prepared at the first call and again where its weights have changed.

    Args:
        base_classifier: maps [batch, ...] to [batch, num_classes].
        num_classes: number of classes; sigma: the noise level.
        seed: in [0, 2^63), by default from the operating system's entropy.  Every call draws new noise from it.
        dtype, noise, step, offset, compile: as for `pacd_fast.certify`.
    """

    ABSTAIN = ABSTAIN

    def __init__(
        self,
        base_classifier: Model,
        num_classes: int,
        sigma: float,
        *,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        noise: str = "lattice",
        step: Numbers | None = None,
        offset: Numbers | None = None,
        compile: Compile = False,
    ):
        self.base_classifier, self.num_classes, self.sigma, self.dtype = base_classifier, num_classes, sigma, dtype
        self.noise, self.compile = Noise.of(noise, sigma, step, offset), compile
        self.seed = secrets.randbits(63) if seed is None else seed
        self._calls = 0
        self._prepared: tuple[tuple[object, ...], list[Tensor], BaseClassifier] | None = None

    def certify(
        self, x: Any, n0: int, n: int, alpha: float, batch_size: int | None = None, *, sides: int = 1
    ) -> tuple[int, float]:
        """(class, l2 radius) of one image x [...], or (ABSTAIN, 0.0); wrong with probability at most alpha.

        x is a tensor or a NumPy array, uint8 divided by 255.  n0 samples select the class, n estimate its probability.
        Raises ValueError as `pacd_fast.certify` does.
        """
        question = Question.of(self.sigma, n0, n, alpha, None, None, sides, 1e-6)
        found = self.draw(x, question, batch_size)
        return found.prediction, found.radius

    def draw(self, x: Any, question: Question, batch_size: int | None = None) -> Certificate:
        """The certificate of one image x [...]: votes, bounds and all."""
        images = _alone(x)
        sampler = sampler_of(
            self.prepared(images[0], batch_size), images, self.num_classes, self.noise, self.seed, question.n,
            image_ids=self._next_id(),
        )  # fmt: skip
        (found,) = certificates(sampler, question, False)
        return found

    def predict(self, x: Any, n: int, alpha: float, batch_size: int | None = None, *, n0: int = 100) -> int:
        """The class of one image x [...] or ABSTAIN; wrong with probability <= alpha.  At most n0 + n samples.

        See `pacd_fast.predict`; raises ValueError as it does.
        """
        check_level(n, alpha, 2e-200)
        images = _alone(x)
        classifier = self.prepared(images[0], batch_size)
        sampler, rule = predictor(
            classifier, images, self.num_classes, self.noise, self.seed, n0, n, alpha, 1e-6,
            image_ids=self._next_id(),
        )  # fmt: skip
        ((_, outcome, _),) = sampler.decide(rule)
        return int(outcome.prediction)

    def _next_id(self) -> Tensor:
        self._calls += 1
        return torch.tensor([self._calls - 1])

    def prepared(self, x: Tensor, batch_size: int | None = None) -> BaseClassifier:
        """The base classifier for such images: the one of the last call where nothing has changed since."""
        model, images = self.base_classifier, pixels(x.unsqueeze(0))
        state = list(model.state_dict().values()) if isinstance(model, nn.Module) else []
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        key = (model, tuple(x.shape), x.device if first is None else first.device, batch_size)
        if self._prepared is not None:
            known, weights, classifier = self._prepared
            if known == key and len(weights) == len(state) and all(map(torch.equal, weights, state)):
                return classifier
        classifier = BaseClassifier(
            model, images, self.num_classes, dtype=self.dtype, rows=batch_size, compile=self.compile, samples=10**5
        )
        self._prepared = key, [each.clone() for each in state], classifier
        return classifier


def _alone(x: Any) -> Tensor:
    """One image as a batch float32 [1, ...].  Raises ValueError."""
    if not isinstance(x, Tensor | np.ndarray):
        raise ValueError(f"x must be a tensor or a NumPy array, not {type(x).__name__}")
    return pixels(x[None])
