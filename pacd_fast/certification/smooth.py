"""The smoothed classifier as an object: a drop-in for Cohen et al.'s class."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import Certification
from pacd_fast.certification.results import ABSTAIN
from pacd_fast.certification.sampler import Model, Sampler
from pacd_fast.certification.vote import certify, check_level


class Smooth:
    """A smoothed classifier g(x) = argmax_c P(f(x + N(0, sigma^2 I)) = c): a drop-in for Cohen et al.'s class.

    Args:
        base_classifier: maps [batch, ...] to [batch, num_classes].
        num_classes: number of classes; sigma: the noise level.
        seed: in [0, 2^63), by default from the operating system's entropy.  Every call draws new noise from it.
        dtype: as for `certify`.
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
    ):
        self.base_classifier, self.num_classes, self.sigma, self.dtype = base_classifier, num_classes, sigma, dtype
        self.seed = secrets.randbits(63) if seed is None else seed
        self._calls = 0

    def _next_id(self) -> Tensor:
        self._calls += 1
        return torch.tensor([self._calls - 1])

    def certify(self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int | None = None) -> tuple[int, float]:
        """(class, l2 radius) of one image x [...], or (ABSTAIN, 0.0); wrong with probability at most alpha.

        n0 samples select the class, n estimate its probability.  Raises ValueError as `pacd_fast.certify` does.
        """
        result = certify(
            self.base_classifier,
            x.unsqueeze(0),
            num_classes=self.num_classes,
            sigma=self.sigma,
            n0=n0,
            n=n,
            alpha=alpha,
            seed=self.seed,
            dtype=self.dtype,
            batch_size=batch_size,
            image_ids=self._next_id(),
        )
        return int(result.prediction[0]), float(result.radius[0])

    def predict(self, x: Tensor, n: int, alpha: float, batch_size: int | None = None) -> int:
        """The class of one image x [...] or ABSTAIN (PREDICT of Cohen et al. 2019); wrong with probability <= alpha.

        The top two classes of n samples are compared by a two-sided binomial test.
        """
        check_level(n, alpha, 2e-200)
        sampler = Sampler(
            self.base_classifier,
            x.unsqueeze(0),
            self.num_classes,
            self.sigma,
            self.seed,
            self.dtype,
            batch_size,
            self._next_id(),
        )
        loop = Certification(1, 0, n, alpha, sampler.sigma)
        ((_, _, votes, _),) = list(sampler.run(loop, n, False))
        if missing := n - int(votes.sum()):
            raise ValueError(f"the model returned NaN for {missing} of {n} noisy copies")
        first, second = votes.topk(2)[0].tolist()
        # P(Binomial(first + second, 1/2) >= first) <= alpha / 2 is the same as a lower bound of at least 1/2.
        bound = ops.clopper_pearson_lower(torch.tensor(first), first + second, alpha / 2)
        # stable: the lowest class among equals, like numpy's argmax
        return int(votes.argmax()) if float(bound) >= 0.5 else ABSTAIN
