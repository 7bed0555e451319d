"""Randomized smoothing (Cohen, Rosenfeld, Kolter 2019): sample, predict and certify at the model's speed."""

from __future__ import annotations

import copy
import math
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import ops
from pacd_fast._C import Certification, keep_freed_memory, product_down

__all__ = ["Certificate", "Certificates", "Smooth", "certify", "certify_each", "largest_radius", "smallest_n"]

ABSTAIN = -1
SELECTION, ESTIMATION = 0, 1  # the two streams of noise; training uses 2 and up
ROWS = 64  # a model runs on a multiple of this many rows, padded: very small batches take other code paths, other bits

Model: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
Piece: TypeAlias = tuple[int, int, int, int]
"""Samples [first, first + count) of an image on a stream: (image, stream, first, count)."""
Tally: TypeAlias = Callable[[Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Certificate:
    """One image's certificate; see `Certificates` for the fields."""

    index: int
    prediction: int
    selected: int
    radius: float
    p_lower: float
    counts: Tensor
    selection_counts: Tensor
    seconds: float


@dataclass(frozen=True)
class Certificates:
    """The certificates of N images.

    Attributes:
        prediction: int64 [N], the smoothed classifier's class, -1 where it abstains.
        radius: float64 [N], l2 radius within which the prediction is constant, 0 where it abstains; in pixel units.
        p_lower: float64 [N], lower confidence bound on the selected class's probability under noise.
        counts: int64 [N, num_classes], votes of the n estimation samples.
        selection_counts: int64 [N, num_classes], votes of the n0 selection samples.
        seed: what the noise was drawn from; give it again to get the same certificates.

    Each certificate holds with probability at least 1 - alpha over the noise, one by one (not all N at once).
    """

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor
    counts: Tensor
    selection_counts: Tensor
    seed: int


def smallest_n(alpha: float) -> int:
    """The smallest n at which an image can be certified at all: alpha^(1/n) > 1/2."""
    n = max(1, int(math.log(alpha) / math.log(0.5)) - 1)
    while not float(ops.clopper_pearson_lower(torch.tensor(n), n, alpha)) > 0.5:
        n += 1
    return n


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius of an image whose n votes all agree: sigma * Phi^-1(alpha^(1/n)), down; 0 if n is too small."""
    p = ops.clopper_pearson_lower(torch.tensor(n), n, alpha)
    return max(0.0, product_down(float(torch.tensor(sigma, dtype=torch.float32)), float(ops.normal_quantile(p))))


def certify(
    model: Model,
    images: Tensor,
    *,
    num_classes: int,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> Certificates:
    """CERTIFY of Cohen et al. 2019 for a batch of images, in l2.

    Per image n0 samples choose the class, n others give a Clopper-Pearson lower bound p on its probability under noise,
    at level 1 - alpha; the radius is sigma * Phi^-1(p), and where p <= 1/2 it abstains.  Both are rounded down.

    Args:
        model: images [M, ...] -> logits [M, num_classes].  A module is copied, put into eval mode and, for 4-d images
            on the CPU or in half precision, into channels_last; it must not look at other images of its batch.
        images: float [N, ...], pixels as the model takes them, on any device; moved to the model's.  Noise and radius
            are about the float32 image: float64 pixels must be float32 numbers.
        sigma: the noise's standard deviation in pixel units, rounded to float32 (the radius uses the rounded number).
        n0, n: selection and estimation samples per image; alpha: failure probability of each certificate.
        seed: in [0, 2^63); by default from the operating system's entropy.  A seed that an adversary knows while
            choosing the inputs voids the probability statement.
        dtype: float32 or bfloat16; by default the model's own, and float32 for a float64 model.  The certificate is for
            the model in that dtype, as torch computes it (on CUDA, TF32 where torch.backends allows it).
        batch_size: rows a forward pass; by default the fastest of a few, tried on the first samples.  On the CPU
            certificates do not depend on it; on CUDA the libraries choose kernels by size, and a vote near a tie may
            change.  (On the CPU the process keeps what memory it has freed, for the next batch.)
        image_ids: int64 [N], which noise each image gets; by default 0..N-1.
        progress: show a bar with samples a second, images done and time left.

    Raises:
        ValueError: for arguments out of range, an n at which nothing could be certified, a model that returns another
            number of classes or NaN.
    """
    seed = secrets.randbits(63) if seed is None else seed
    shape = (len(images), num_classes)
    result = Certificates(
        prediction=torch.full(shape[:1], ABSTAIN),
        radius=torch.zeros(shape[:1], dtype=torch.float64),
        p_lower=torch.zeros(shape[:1], dtype=torch.float64),
        counts=torch.zeros(shape, dtype=torch.int64),
        selection_counts=torch.zeros(shape, dtype=torch.int64),
        seed=seed,
    )
    for one in certify_each(
        model,
        images,
        num_classes=num_classes,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        seed=seed,
        dtype=dtype,
        batch_size=batch_size,
        image_ids=image_ids,
        progress=progress,
    ):
        result.prediction[one.index] = one.prediction
        result.radius[one.index] = one.radius
        result.p_lower[one.index] = one.p_lower
        result.counts[one.index] = one.counts
        result.selection_counts[one.index] = one.selection_counts
    return result


def certify_each(
    model: Model,
    images: Tensor,
    *,
    num_classes: int,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> Generator[Certificate, None, None]:
    """The same as `certify`, one image at a time as they are finished, in order; `seed` is needed."""
    check_arguments(n0, n, alpha, sigma, seed)
    sampler = Sampler(model, images, num_classes, sigma, seed, dtype, batch_size, image_ids)
    loop = Certification(len(images), n0, n, alpha, sampler.sigma)
    for index, selection, estimation, seconds in sampler.run(loop, n0 + n, progress):
        missing = n0 + n - int(selection.sum() + estimation.sum())
        if missing:
            raise ValueError(
                f"the model returned NaN for {missing} of {n0 + n} noisy copies "
                f"of image {int(sampler.image_ids[index])}"
            )
        prediction, selected, p_lower, radius = loop.issue(selection.numpy(), estimation.numpy())
        yield Certificate(index, prediction, selected, radius, p_lower, estimation, selection, seconds)


def check_level(n: int, alpha: float, least: float = 1e-200) -> None:
    """Raises ValueError where there is no Clopper-Pearson bound (see `ops.clopper_pearson_lower`)."""
    if n >= 2**31:
        raise ValueError(f"n must be below 2^31, not {n}")
    if not least <= alpha <= 1 - 2**-20:
        raise ValueError(f"alpha must be in (0, 1), not {alpha} (at least {least:g}, at most 1 - 2^-20)")


def check_arguments(n0: int, n: int, alpha: float, sigma: float, seed: int) -> None:
    """Raises ValueError for numbers out of range, or an n at which nothing could be certified, before any sample."""
    if n < 1 or n0 < 1:
        raise ValueError(f"n0 and n must be positive, not {n0} and {n}")
    check_level(n, alpha)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), not {seed}")
    if n < (enough := smallest_n(alpha)):
        least, usual = largest_radius(sigma, enough, alpha), largest_radius(sigma, 100_000, alpha)
        raise ValueError(
            f"n = {n} is too small to certify anything at alpha = {alpha}: it takes n = {enough}, which reaches "
            f"radius {least:.4f}; n = 100000 reaches {usual:.4f}"
        )


class Sampler:
    """Counts a model's votes on noisy copies of images: images share batches, every batch is full but the last."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        num_classes: int,
        sigma: float,
        seed: int,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        image_ids: Tensor | None = None,
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if images.dim() < 2 or not images.is_floating_point():
            raise ValueError(f"images must be float [N, ...], not {images.dtype} {tuple(images.shape)}")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images hold NaN or infinity")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        if image_ids is None:
            image_ids = torch.arange(len(images))
        if image_ids.dtype != torch.int64 or image_ids.shape != images.shape[:1]:
            raise ValueError(f"image_ids must be int64 [{len(images)}], not {image_ids.dtype} {tuple(image_ids.shape)}")
        if len(image_ids) and not 0 <= int(image_ids.min()) <= int(image_ids.max()) < 2**48:
            raise ValueError("image_ids must be in [0, 2^48)")
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if first is None else first.device
        self.dtype = dtype or (images.dtype if first is None else first.dtype)
        if self.dtype == torch.float64:
            self.dtype = torch.float32
        if images.dtype == torch.float64 and not torch.equal(images.float().double(), images):
            raise ValueError("float64 images are certified in float32, which does not hold these: give images.float()")
        if self.dtype not in ops.FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        self.sigma = float(torch.tensor(sigma, dtype=torch.float32))  # what the noise really has
        self.seed, self.num_classes = seed, num_classes
        self.images = images.to(self.device, torch.float32)
        self.image_ids = image_ids.to(self.device)
        half = self.dtype != torch.float32
        last = images.dim() == 4 and (half or self.device.type == "cpu")
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        if self.device.type == "cpu":
            keep_freed_memory()  # fresh pages for every batch cost up to as much as the network
        self.model = self._fixed(model)
        self.given_batch_size = batch_size
        self._buffer: Tensor | None = None

    def _fixed(self, model: Model) -> Model:
        """The base classifier as one fixed function; the caller's module is left alone."""
        if not isinstance(model, nn.Module):
            return model
        model = copy.deepcopy(model).eval().requires_grad_(False)
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def _rows(self, rows: int) -> Tensor:
        """A reused buffer: fresh pages for every batch would cost more than the noise.

        With one channel both layouts are the same memory, but convolutions look at the strides.
        """
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = torch.empty(
                (rows, *self.images.shape[1:]), dtype=self.dtype, device=self.device, memory_format=self.memory_format
            ).zero_()
        return self._buffer[:rows]

    @torch.inference_mode()
    def logits(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """The model's logits for some pieces, row after row, [rows, num_classes]; and the row of `counts` of each."""
        rows = sum(piece[3] for piece in pieces)
        batch = self._rows(-(-rows // ROWS) * ROWS)
        where, start = torch.empty(rows, dtype=torch.int64), 0
        for image, stream, first, count in pieces:
            ops.noisy_copies(
                self.images[image : image + 1],
                self.sigma,
                count,
                self.seed,
                first=first,
                image_ids=self.image_ids[image : image + 1],
                stream=stream,
                out=batch[start : start + count],
            )
            where[start : start + count] = stream * len(self.images) + image
            start += count
        where = where.to(self.device)  # before the model: behind it, the copy would wait for the whole pass
        logits = self.model(batch)
        if not isinstance(logits, Tensor) or logits.shape != (len(batch), self.num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits [{len(batch)}, {self.num_classes}], not {found}")
        logits = logits[:rows] if logits.dtype in ops.FLOATS else logits[:rows].float()
        return logits, where

    def run(
        self,
        loop: Certification,
        samples: int,
        progress: bool,
        tally: Tally = ops.tally_votes,
        columns: int | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Draws what `loop` plans; yields (image, selection votes, estimation votes, seconds) of finished images.

        tally(counts, logits, image_index) adds what a batch says to int64 [.., columns]; votes for classes by default.
        """
        images = len(self.images)
        counts = torch.zeros(2 * images, columns or self.num_classes, dtype=torch.int64, device=self.device)
        sizes = _BatchSizes(self.given_batch_size, self.device)
        done, since = 0, time.perf_counter()
        interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        bar = tqdm(
            total=images * samples,
            unit="sample",
            unit_scale=True,
            disable=not progress,
            smoothing=0.1,
            mininterval=interval,
        )
        try:
            while pieces := loop.plan(sizes.size):
                started, parts = time.perf_counter(), None
                try:
                    tally(counts, *self.logits(pieces))
                except torch.OutOfMemoryError:
                    self._buffer = None
                    if (smaller := sizes.out_of_memory()) is None:
                        raise
                    parts = _split(pieces, smaller)
                for part in parts or ():  # out here the error has let go of the batch's activations
                    tally(counts, *self.logits(part))
                rows = sum(piece[3] for piece in pieces)
                if sizes.trying:
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    sizes.took(rows, time.perf_counter() - started)
                bar.update(rows)
                if loop.planned > done:
                    selection = counts[done : loop.planned].cpu()
                    estimation = counts[images + done : images + loop.planned].cpu()
                    now = time.perf_counter()
                    seconds = (now - since) / (loop.planned - done)
                    first, done, since = done, loop.planned, now
                    rate = done / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{done}/{images} images, {rate:.2f} images/s", refresh=False)
                    for i, index in enumerate(range(first, done)):
                        yield index, selection[i], estimation[i], seconds
        finally:
            bar.close()


class _BatchSizes:
    """The size of the next batch: the given one, or a few in turn, timed on real samples, and then the fastest."""

    ROUNDS = 4  # the first at a size is warming up

    def __init__(self, given: int | None, device: torch.device):
        first, count = (64, 5) if device.type == "cpu" else (512, 6)
        self._candidates = [given] if given is not None else [first << i for i in range(count)]
        self._costs: dict[int, list[float]] = {size: [] for size in self._candidates}
        self.trying = given is None
        self.size = self._candidates[0]

    def took(self, rows: int, seconds: float) -> None:
        """What the last batch cost; a batch at the end that was not full says nothing."""
        if rows != self.size:
            return
        self._costs[self.size].append(seconds / rows)
        while self._candidates and len(self._costs[self._candidates[0]]) == self.ROUNDS:
            tried = self._candidates.pop(0)
            if self._best(tried) > 1.3 * min(self._best(size) for size, costs in self._costs.items() if costs):
                self._candidates.clear()  # it only gets slower
        self.trying = bool(self._candidates)
        self.size = (
            self._candidates[0] if self.trying else min((s for s, c in self._costs.items() if c), key=self._best)
        )

    def _best(self, size: int) -> float:
        return min(self._costs[size][1:], default=math.inf)

    def out_of_memory(self) -> int | None:
        """The size to go on with after the device ran out of memory; None where none is smaller."""
        smaller = [size for size, costs in self._costs.items() if costs and size < self.size]
        if not smaller:
            return None
        self._candidates, self.trying, self.size = [], False, min(smaller, key=self._best)
        return self.size


def _split(pieces: list[Piece], rows: int) -> Iterator[list[Piece]]:
    """The same samples in batches of at most `rows`."""
    for image, stream, first, count in pieces:
        for start in range(0, count, rows):
            yield [(image, stream, first + start, min(rows, count - start))]


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
