"""Randomized smoothing (Cohen, Rosenfeld, Kolter 2019): certificates of images at the model's speed."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacd_fast._C import Outcome
from pacd_fast.arguments import seed_in_range, whole
from pacd_fast.certification.classifier import USUAL, BaseClassifier, Compile, Model
from pacd_fast.certification.noise import Copies, Noise, Numbers
from pacd_fast.certification.question import Question
from pacd_fast.certification.sampler import Sampler
from pacd_fast.certification.sharing import Share, SharedImages
from pacd_fast.data import as_float, as_images, images_of
from pacd_fast.networks import fingerprint
from pacd_fast.ranks import Ranks

LARGE = 16.0  # what no pixel in [0, 1] is, nor one that was normalised


@dataclass(frozen=True)
class Certificate:
    """One image's certificate; see `Certificates` for the fields."""

    index: int
    prediction: int
    selected: int
    radius: float
    p_lower: float
    rival_upper: float
    samples: int
    voids: int
    counts: Tensor
    selection_counts: Tensor
    seconds: float

    @classmethod
    def of(cls, index: int, outcome: Outcome, seconds: float) -> Certificate:
        """The certificate that an outcome of a rule is."""
        counts, selection = torch.from_numpy(outcome.counts), torch.from_numpy(outcome.selection)
        return cls(
            index, outcome.prediction, outcome.selected, outcome.radius, outcome.p_lower, outcome.rival_upper,
            outcome.samples, outcome.voids, counts, selection, seconds,
        )  # fmt: skip


@dataclass(frozen=True)
class Certificates:
    """The certificates of N images.

    Attributes:
        prediction: int64 [N], the smoothed classifier's class, -1 where it abstains.
        radius: float64 [N], l2 radius within which the prediction is constant, 0 where it abstains; in pixel units.
        p_lower: float64 [N], lower confidence bound on the selected class's probability under noise.
        rival_upper: float64 [N], with sides = 2 the upper bound on the probability of every other class, else 1.
        samples: int64 [N], estimation samples that were drawn to decide.
        voids: int64 [N], void samples among those of the counts: misses.
        counts: int64 [N, num_classes], votes of the estimation samples that the certificate rests on: all n, or those
            up to a look.
        selection_counts: int64 [N, num_classes], votes of the n0 selection samples.
        seed: what the noise was drawn from; give it again to get the same certificates.
        noise: which noise, and on which lattice; one for every sigma, rising, where sigmas differ.

    Each certificate holds with probability at least 1 - alpha over the noise, one by one (not all N at once).
    """

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor
    rival_upper: Tensor
    samples: Tensor
    voids: Tensor
    counts: Tensor
    selection_counts: Tensor
    seed: int
    noise: Noise | tuple[Noise, ...]


def certify(
    model: Model,
    images: Any,
    *,
    num_classes: int,
    sigma: Numbers,
    n0: float = 100,
    n: float = 100_000,
    alpha: float = 0.001,
    radii: Sequence[float] | None = None,
    tolerance: float | None = None,
    sides: int = 1,
    futility: float = 1e-6,
    noise: str = "lattice",
    step: Numbers | None = None,
    offset: Numbers | None = None,
    check: bool = False,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    compile: Compile = "auto",
    image_ids: Tensor | None = None,
    progress: bool = False,
    group: Any = None,
) -> Certificates:
    """CERTIFY of Cohen et al. 2019 for a batch of images, in l2.

    Per image n0 samples choose the class, n others give a Clopper-Pearson lower bound p on its probability under noise,
    at level 1 - alpha; the radius is sigma * Phi^-1(p), and where p <= 1/2 it abstains.  Both are rounded down.  Images
    that cannot be certified any more stop early.  With `radii` or `tolerance` all images stop as soon as the question
    is answered, by group-sequential tests at the same level.

    Args:
        model: images [M, ...] -> logits [M, num_classes].  A module is copied, put into eval mode, its batch norms
            folded, and for 4-d images on the CPU or in half precision put into channels_last; it must not look at
            other images of its batch.  A module that torch.compile returned is taken as it is.
        images: [N, ...], pixels as the model takes them, on any device, moved to the model's: a tensor, NumPy array, or
            DataLoader of images or (images, labels).  uint8 is divided by 255.  Noise and radius are about the float32
            image: float64 pixels must be float32 numbers.  A warning says so where they look like 8 bits and sigma not.
        sigma: the noise's standard deviation in pixel units, rounded to float32 (the radius uses the rounded number);
            or one for each image, [N].
        n0, n: selection and estimation samples per image; alpha: failure probability of each certificate.
        radii: rising; for each image the largest of these that is certified is its radius.
        tolerance: stop when the radius is known within so much.
        sides: 2 for R = sigma / 2 (Phi^-1(p_A lower) - Phi^-1(p_B upper)), both at alpha / 2: larger where the votes of
            the rest are spread over classes, and also where p_A < 1/2.
        futility: without radii and tolerance, a share of at most so many images that would be certified may be given up
            early; 0 draws all n for every image.  Certificates issued do not depend on it.
        noise: "lattice", whose certificates hold in floating point (`ops.lattice_copies`), or "float", the usual one,
            whose certificates do not.
        step, offset: of the lattice, one number or one per channel: 1/255 and 0 by default.  For a model that takes
            (x - mean) / std give 1 / 255 / std and -mean / std.  A step above sigma / 4 is halved until it is not.
        check: raise where a pixel is not on the lattice, for images that are claimed to be.
        seed: in [0, 2^63); by default from the operating system's entropy.  A seed that an adversary knows while
            choosing the inputs voids the probability statement.
        dtype: float32, bfloat16 or float16; by default the model's own, and float32 for a float64 model.  The
            certificate is for the model in that dtype, as torch computes it (on CUDA, TF32 where torch.backends allows
            it).
        batch_size: rows of every forward pass, the last ones padded; by default the fastest of a few, tried on
            throw-away noise where that pays.  (On the CPU the process keeps what memory it has freed, for the next
            batch.)  On the CPU eager certificates do not depend on it from 64 rows on: below,
            libraries choose other code, and a vote near a tie may change, as on CUDA it may with every size.
        compile: True to run the model through torch.compile, "auto" where the samples to draw pay for it, False, or
            "max-autotune".  A compiled model's votes near a tie may differ.
        image_ids: int64 [N], which noise each image gets; by default 0..N-1.
        progress: show a bar with samples a second, images done and time left.
        group: a torch.distributed process group that certifies them together: all its processes call this with the same
            arguments, each draws for the images that it is handed as it asks for them, and all get all certificates.
            Nothing that is measured then decides how the model is run: batch_size is 256 (4096 on CUDA), compile False
            where they are not given.

    Raises:
        ValueError: for arguments out of range, an n at which nothing could be certified, a model that returns another
            number of classes or NaN, processes of a group that differ, naming rank and difference.
    """
    ranks = Ranks.of_group(group)
    entropy = ranks.everyones(secrets.randbits(63))[0]
    seed = entropy if seed is None else seed
    images, num_classes = pixels(images), _classes(num_classes)
    ids = torch.arange(len(images)) if image_ids is None else torch.as_tensor(image_ids)
    parts = by_sigma(sigma, len(images))
    laws = tuple(Noise.of(noise, each, step, offset) for each, _ in parts)
    numbers, votes = torch.zeros(3, len(images), dtype=torch.int64), torch.zeros(2, len(images), num_classes).long()
    reals = torch.zeros(3, len(images), dtype=torch.float64)
    result = Certificates(
        numbers[0] - 1, reals[0], reals[1], reals[2] + 1, numbers[1], numbers[2], votes[0], votes[1], seed,
        laws[0] if len(laws) == 1 else laws,
    )  # fmt: skip
    mine = torch.zeros(len(images), dtype=torch.bool)
    for each, part in parts:
        for found in certify_each(
            model, images[part], num_classes=num_classes, sigma=each, n0=n0, n=n, alpha=alpha, radii=radii,
            tolerance=tolerance, sides=sides, futility=futility, noise=noise, step=step, offset=offset, check=check,
            seed=seed, dtype=dtype, batch_size=batch_size, compile=compile, image_ids=ids[part], progress=progress,
            group=group,
        ):  # fmt: skip
            at = part[found.index]
            mine[at] = True
            result.prediction[at], result.radius[at], result.p_lower[at] = found.prediction, found.radius, found.p_lower
            result.rival_upper[at], result.samples[at], result.voids[at] = found.rival_upper, found.samples, found.voids
            result.counts[at], result.selection_counts[at] = found.counts, found.selection_counts
    if group is not None:  # of every row one has other numbers than 0
        for field in dataclasses.fields(result):
            if isinstance(tensor := getattr(result, field.name), Tensor):
                tensor[~mine] = 0
                tensor.copy_(ranks.summed_tensor(tensor))
    return result


def certify_each(
    model: Model,
    images: Any,
    *,
    num_classes: int,
    sigma: float,
    seed: int,
    n0: float = 100,
    n: float = 100_000,
    alpha: float = 0.001,
    radii: Sequence[float] | None = None,
    tolerance: float | None = None,
    sides: int = 1,
    futility: float = 1e-6,
    noise: str = "lattice",
    step: Numbers | None = None,
    offset: Numbers | None = None,
    check: bool = False,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    compile: Compile = "auto",
    image_ids: Tensor | None = None,
    progress: bool = False,
    group: Any = None,
) -> Generator[Certificate, None, None]:
    """The same as `certify`, one image at a time as they are decided; `seed` is needed, and sigma is one number.

    group: each process gets those images that it is handed.
    """
    question = Question.of(sigma, n0, n, alpha, radii, tolerance, sides, futility)
    law = Noise.of(noise, sigma, step, offset)
    question.rule(law.sigma)  # radii beyond reach are refused before the model is prepared
    if group is not None:
        first = next(model.parameters(), images) if isinstance(model, nn.Module) else images
        batch_size = USUAL[getattr(first, "device", torch.device("cpu")).type] if batch_size is None else batch_size
        compile = False if compile == "auto" else compile
    sampler = sampler_of(
        model, images, num_classes, law, seed, question.n0 + question.likely, dtype=dtype, rows=batch_size,
        compile=compile, check=check, image_ids=image_ids,
    )  # fmt: skip
    share = None
    if group is not None:
        ranks = Ranks.of_group(group)
        ids = sampler.copies.ids.tolist()
        engine = dataclasses.asdict(sampler.classifier.engine)
        about = {"seed": seed, "noise": str(law), "image_ids": ids, "dtype": str(sampler.classifier.dtype), **engine}
        about["images"] = zlib.crc32(sampler.copies.images.cpu().numpy().tobytes())
        network = fingerprint(model) if isinstance(model, nn.Module) else "a function"
        ranks.agree({"model": network, **dataclasses.asdict(question), **about})
        share = SharedImages(ranks, len(ids))
    yield from certificates(sampler, question, progress, share)


def certificates(
    sampler: Sampler, question: Question, progress: bool, share: Share | None = None
) -> Generator[Certificate, None, None]:
    """The answers for a sampler's images, or a share of them, as they are decided."""
    for index, outcome, seconds in sampler.decide(question.rule(sampler.copies.noise.sigma), progress, share):
        yield Certificate.of(index, outcome, seconds)


def by_sigma(sigma: Numbers, count: int) -> list[tuple[float, Tensor]]:
    """The images, int64 [K], of every noise level: all of one number, or by rising level where there is one for each.

    Raises ValueError for another number of levels than images.
    """
    every = torch.arange(count)
    levels = sigma.detach().cpu() if isinstance(sigma, Tensor) else torch.from_numpy(np.asarray(sigma, np.float64))
    if levels.dim() == 0:
        return [(float(levels), every)]
    if levels.shape != every.shape:
        raise ValueError(f"sigma must be a number or [{count}], one per image, not {tuple(levels.shape)}")
    return [(float(each), every[levels == each]) for each in levels.unique()]


def _classes(num_classes: int) -> int:
    num_classes = whole("num_classes", num_classes)
    if not 2 <= num_classes < 2**24:
        raise ValueError(f"num_classes must be at least 2 and below 2^24, not {num_classes}")
    return num_classes


def sampler_of(
    model: Model | BaseClassifier,
    images: Any,
    num_classes: int,
    noise: Noise,
    seed: int,
    samples: int,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    compile: Compile = "auto",
    check: bool = False,
    image_ids: Tensor | None = None,
) -> Sampler:
    """What draws votes, about `samples` for each image.  Raises ValueError, before any sample."""
    seed_in_range(seed)
    images, num_classes = pixels(images), _classes(num_classes)
    ids = torch.arange(len(images)) if image_ids is None else torch.as_tensor(image_ids)
    if ids.dtype != torch.int64 or ids.shape != images.shape[:1]:
        raise ValueError(f"image_ids must be int64 [{len(images)}], not {ids.dtype} {tuple(ids.shape)}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 2**48:
        raise ValueError("image_ids must be in [0, 2^48)")
    if len(images) and noise.sigma <= 1 and LARGE < (most := float(images.max())):
        text = f"the images reach {most:g}, and sigma is {noise.sigma:g} in the same unit"
        warnings.warn(f"{text}: give images of 8 bits as uint8, or divided by 255", stacklevel=2)
    copies = Copies(noise, images, ids.to(images.device), seed, check)
    classifier = model if isinstance(model, BaseClassifier) else BaseClassifier(
        model, images, num_classes, dtype=dtype, rows=rows, compile=compile,
        samples=len(images) * samples,
    )  # fmt: skip
    return Sampler(classifier, copies.to(classifier.device))


def pixels(images: Any) -> Tensor:
    """float32 [N, ...] from a tensor, a NumPy array or a loader, labels or not.  Raises ValueError."""
    images = as_images(images) if isinstance(images, Tensor | np.ndarray) else images_of(images)
    if images.dtype == torch.float64 and not torch.equal(images.float().double(), images):
        raise ValueError("float64 images are certified in float32, which does not hold these: give images.float()")
    images = as_float(images)
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinity")
    return images
