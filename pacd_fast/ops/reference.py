"""The operators and loops in a few lines of torch, numpy or scipy: specification and baseline of the compiled ones.

Imported by tests and benchmarks only.
"""

from __future__ import annotations

import mpmath
import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from scipy.stats import beta, norm
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

MASK = np.uint64(0xFFFFFFFF)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of uint32 counters [..., 4]; Salmon et al. 2011."""
    w0, w1, w2, w3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * w0, np.uint64(0xCD9E8D57) * w2
        w0, w1, w2, w3 = (
            (p1 >> np.uint64(32)) ^ w1 ^ np.uint64(k0),
            p1 & MASK,
            (p0 >> np.uint64(32)) ^ w3 ^ np.uint64(k1),
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([w0, w1, w2, w3], -1).astype(np.uint32)


def unit_vectors(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle of a word: 29 bits within an eighth of a turn, then a swap and two signs."""
    angle = (words & 0x1FFFFFFF).astype(np.float64) * (np.pi / 4 / 2**29)
    swap = (words & 0x20000000) != 0
    cosine, sine = np.where(swap, np.sin(angle), np.cos(angle)), np.where(swap, np.cos(angle), np.sin(angle))
    return np.where(words & 0x40000000, -cosine, cosine), np.where(words & 0x80000000, -sine, sine)


def standard_normals(elements: int, seed: int, stream: int, image: int, sample: int) -> np.ndarray:
    """The noise of one sample as float64 [elements], in exact arithmetic of its random words."""
    tiles = -(-elements // 64)
    counter = np.zeros((tiles * 16, 4), np.uint32)
    counter[:, 0] = np.arange(tiles * 16)
    counter[:, 1:] = sample, image & 0xFFFFFFFF, (stream << 16) | (image >> 32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    # uniforms are rounded to float32 on the way, which is all that single precision does near u = 1
    u = (
        (words[:, 0::2].astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33)
        .astype(np.float32)
        .astype(np.float64)
    )
    radius, cosine, sine = np.sqrt(np.maximum(-2 * np.log(u), 0)), *unit_vectors(words[:, 1::2])
    numbers = np.stack([radius * cosine, radius * sine], -1)  # [counter, pair, (cosine, sine)]
    return numbers.reshape(tiles, 16, 4).transpose(0, 2, 1).reshape(-1)[:elements]


def noisy_copies(
    x,
    sigma,
    copies=1,
    seed=0,
    *,
    first=0,
    image_ids=None,
    stream=0,
    dtype=None,
    memory_format=None,
    mean=None,
    std=None,
):
    """`pacd_fast.ops.noisy_copies`, computed in float64 and rounded once."""
    ids = range(len(x)) if image_ids is None else image_ids.tolist()
    noise = np.stack([standard_normals(x[0].numel(), seed, stream, i, first + j) for i in ids for j in range(copies)])
    y = x.double().repeat_interleave(copies, 0) + sigma * torch.from_numpy(noise).reshape(-1, *x.shape[1:])
    if mean is not None:
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = (y - torch.as_tensor(mean, dtype=torch.float64).reshape(shape)) / torch.as_tensor(
            std, dtype=torch.float64
        ).reshape(shape)
    return y.to(dtype or x.dtype).contiguous(memory_format=memory_format or torch.contiguous_format)


def random_words(elements: int, seed: int, stream: int, image: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """The radius word and the angle word of every element; which of the pair's numbers it is: element // 16 % 2."""
    tiles = -(-elements // 64)
    counter = np.zeros((tiles * 16, 4), np.uint32)
    counter[:, 0] = np.arange(tiles * 16)
    counter[:, 1:] = sample, image & 0xFFFFFFFF, (stream << 16) | (image >> 32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(tiles, 16, 2, 2).repeat(2, 2)
    words = words.transpose(0, 2, 1, 3).reshape(-1, 2)[
        :elements
    ]  # element 64 t + 16 w + l has word w of block 16 t + l
    return words[:, 0], words[:, 1]


def exact_cell(x: float, sigma: float, step: float, offset: float, radius: int, angle: int, sine: bool) -> int:
    """round((x + sigma * Z - offset) / step) for the Z of 64 digits each for radius and angle, with 50 decimals."""
    with mpmath.workdps(50):
        u = (mpmath.mpf(radius) + 0.5) / 2**64
        turn = (mpmath.mpf(angle & (2**61 - 1)) + 0.5) / 2**61 * mpmath.pi / 4
        swap, negative = bool(angle >> 61 & 1), bool(angle >> (63 if sine else 62) & 1)
        part = mpmath.sin(turn) if sine != swap else mpmath.cos(turn)
        z = mpmath.sqrt(-2 * mpmath.log(u)) * (-part if negative else part)
        return int(mpmath.nint((mpmath.mpf(x) + mpmath.mpf(sigma) * z - mpmath.mpf(offset)) / mpmath.mpf(step)))


def lattice_cells(
    x: np.ndarray,
    sigma: float,
    step: np.ndarray,
    offset: np.ndarray,
    seed: int,
    stream: int,
    image: int,
    sample: int,
) -> np.ndarray:
    """The cells of a sample of one image, float64 [elements]: in float64, and with mpmath where that is near an end."""
    words = random_words(x.size, seed, stream, image, sample)
    further = random_words(x.size, seed, stream | 0x8000, image, sample)
    radius, angle = (w.astype(object) * 2**32 + v.astype(object) for w, v in zip(words, further, strict=True))
    sine = np.arange(x.size) // 16 % 2 == 1
    cosines, sines = unit_vectors(words[1])
    z = np.sqrt(-2 * np.log((words[0] + 0.5) * 2.0**-32)) * np.where(sine, sines, cosines)
    a = (x + sigma * z - offset) / step
    cells = np.rint(a)
    # 32 digits leave Z open by 1e-3 for the first words and last words, and by 1e-5 where neither is near
    coarse = np.minimum(words[0], 2**32 - 1 - words[0].astype(np.int64)) < 2**16
    near = np.abs(a - cells) > 0.5 - 1e-5 * (1 + sigma / step) - 1e-9 * np.abs(a)
    for e in np.flatnonzero(coarse | near):
        cells[e] = exact_cell(x[e], sigma, step[e], offset[e], radius[e], angle[e], bool(sine[e]))
    return cells


def lattice_copies(
    x,
    sigma,
    copies=1,
    seed=0,
    *,
    step,
    offset=None,
    first=0,
    image_ids=None,
    stream=0,
    dtype=None,
    memory_format=None,
):
    """`pacd_fast.ops.lattice_copies` with exact cells; no copy is void (the probability of one is 1e-11 an element)."""
    ids = range(len(x)) if image_ids is None else image_ids.tolist()
    channels = [-1, *[1] * (x.dim() - 2)] if x.dim() > 1 else []
    steps, offsets = (
        torch.as_tensor(0.0 if v is None else v, dtype=torch.float64)
        .reshape(channels)
        .expand(x.shape[1:])
        .numpy()
        .ravel()
        for v in (step, offset)
    )
    sigma = float(np.float32(sigma))
    cells = np.stack(
        [
            lattice_cells(image.double().numpy().ravel(), sigma, steps, offsets, seed, stream, i, first + j)
            for image, i in zip(x, ids, strict=True)
            for j in range(copies)
        ]
    )
    y = torch.from_numpy(cells * steps + offsets).float().reshape(-1, *x.shape[1:])
    y = y.to(dtype or x.dtype).contiguous(memory_format=memory_format or torch.contiguous_format)
    return y, torch.zeros(len(y), dtype=torch.bool)


def threshold_table(sigma: float, step: float = 1 / 255) -> Tensor:
    """int64 [cells]: the masses of the cells of rounded Gaussian noise in units of 2^-60, added up.

    The cells of 6 sigma and one more unit of x either way, each mass rounded down; the rest is what is void.
    """
    reach = round((max(1, int(6 * sigma)) + 1) / step)
    with mpmath.workdps(40):
        ends = [mpmath.ncdf((i - mpmath.mpf(1) / 2) * step / sigma) for i in range(-reach, 1)]
        half = [int(mpmath.floor((b - a) * 2**60)) for a, b in zip(ends, ends[1:], strict=False)]  # below the middle
        middle = int(mpmath.floor((1 - 2 * ends[-1]) * 2**60))
    return torch.tensor([*half, middle, *reversed(half)]).cumsum(0)


def threshold_copies(x: Tensor, table: Tensor, copies: int, step: float = 1 / 255, *, one_by_one: bool = False):
    """Lattice noise by 60-bit integers against thresholds, for x on the lattice: the sampler of Voracek and Hein 2023.

    one_by_one: a comparison with every threshold, as in their code; else a binary search.  Returns copies and voids.
    """
    u = torch.randint(0, 2**60, (len(x) * copies, *x.shape[1:]))
    if one_by_one:
        cells = torch.zeros(u.shape)
        for threshold in table.tolist():
            cells += u >= threshold
    else:
        cells = torch.searchsorted(table, u, right=True)
    voids = (u >= table[-1]).flatten(1).any(1)
    return (x.repeat_interleave(copies, 0) / step + (cells - len(table) // 2)).round() * step, voids


def add_votes_(counts: Tensor, logits: Tensor, image_index: Tensor, void: Tensor | None = None) -> Tensor:
    """`pacd_fast.ops.add_votes_`."""
    if void is not None:
        counts[:, -1] += torch.bincount(image_index[void], minlength=len(counts))
        logits, image_index = logits[~void], image_index[~void]
    nan = ~logits.amax(1).isfinite()  # amax is NaN where a number is
    votes, index = logits.argmax(1)[~nan], image_index[~nan]
    counts.index_put_((index, votes), torch.ones_like(index), accumulate=True)
    return torch.bincount(image_index[nan], minlength=len(counts))


def clopper_pearson_lower(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """`pacd_fast.ops.clopper_pearson_lower`, not rounded outward."""
    k, n, alpha = torch.broadcast_tensors(k, torch.as_tensor(n), torch.as_tensor(alpha, dtype=torch.float64))
    bound = beta.ppf(alpha.numpy(), k.numpy().clip(1), (n - k).numpy() + 1)
    return torch.where(k == 0, 0.0, torch.from_numpy(np.asarray(bound)))


def clopper_pearson_upper(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """`pacd_fast.ops.clopper_pearson_upper`, not rounded outward."""
    k, n, alpha = torch.broadcast_tensors(k, torch.as_tensor(n), torch.as_tensor(alpha, dtype=torch.float64))
    bound = beta.isf(alpha.numpy(), k.numpy() + 1, (n - k).numpy().clip(1))
    return torch.where(k == n, 1.0, torch.from_numpy(np.asarray(bound)))


def normal_quantile(p: Tensor, *, rounding: str = "down") -> Tensor:
    """`pacd_fast.ops.normal_quantile`, not rounded outward."""
    return torch.from_numpy(np.asarray(norm.ppf(p.numpy())))


def tail_bound(
    alpha: np.ndarray, values: np.ndarray, probabilities: np.ndarray, threshold: float
) -> tuple[float, float]:
    """(t, K(t)) at the minimum of K(t) = t threshold + sum_i log sum_v p_iv exp(-t alpha_i v), where there is one.

    values [V] and probabilities [n, V] of the noisy label of every point.
    """

    def slope(t: float) -> float:
        weight = softmax(np.log(probabilities) - t * alpha[:, None] * values, axis=1)
        return float(threshold - alpha @ (weight @ values))

    end = -np.sign(slope(0.0)) / np.abs(alpha).max()
    while slope(0.0) * slope(end) > 0:
        end *= 2
    t = brentq(slope, 0.0, end, xtol=1e-300, rtol=1e-12)
    return t, t * threshold + logsumexp(np.log(probabilities) - t * alpha[:, None] * values, axis=1).sum()


def chernoff_newton(alpha: Tensor, y: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """`pacd_fast.ops.chernoff_newton`, not rounded up."""
    likely = np.where(y.numpy()[:, None] == [0, 1], 1 - q, q)
    found = [tail_bound(row, np.array([0.0, 1.0]), likely, 0.5) for row in alpha.numpy()]
    t, log_tail = np.array(found).reshape(-1, 2).T.copy()
    return torch.from_numpy(t), torch.from_numpy(log_tail)


def chernoff_newton_pairs(alpha: Tensor, y: Tensor, pairs: Tensor, q: float, classes: int) -> tuple[Tensor, Tensor]:
    """`pacd_fast.ops.chernoff_newton_pairs`, not rounded up."""
    found = []
    for row, rivals in zip(alpha.numpy(), pairs, strict=True):
        for pair in rivals:
            likely = np.where(y.numpy()[:, None] == pair.numpy(), 1 - q, q / (classes - 1))
            likely = np.column_stack([likely, 1 - likely.sum(1)])
            found.append(tail_bound(row, np.array([1.0, -1.0, 0.0]), likely, 0.0))
    t, log_tail = np.array(found).reshape(*pairs.shape[:2], 2).transpose(2, 0, 1).copy()
    return torch.from_numpy(t), torch.from_numpy(log_tail)


def max_pool_relu(x: Tensor) -> Tensor:
    """`pacd_fast.ops.max_pool_relu`."""
    return torch.relu(torch.nn.functional.max_pool2d(x, 2))


def narrow_grad(grad: Tensor, filters: Tensor, height: int, width: int) -> Tensor:
    """`pacd_fast.ops.narrow_grad`."""
    return torch.nn.functional.conv_transpose2d(grad.float(), filters)


def convolve3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """`pacd_fast.ops.convolve3x3`."""
    if transposed:
        return torch.nn.functional.conv_transpose2d(x, weight, bias, padding=1)
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


def soft_smooth(logits: Tensor, beta: float = 1.0) -> Tensor:
    """`pacd_fast.ops.soft_smooth`."""
    return torch.softmax(beta * logits, 2).mean(1)


def soft_radius(logits: Tensor, labels: Tensor, *, beta: float, sigma: float, squeeze: float = 0.001) -> Tensor:
    """`pacd_fast.ops.soft_radius`."""
    top, which = soft_smooth(logits, beta).topk(2, 1)
    z = torch.special.ndtri((1 - 2 * squeeze) * top + squeeze)
    return torch.where(which[:, 0] == labels, sigma / 2 * (z[:, 0] - z[:, 1]), 0.0)


def macer(logits: Tensor, labels: Tensor, *, sigma: float, beta: float, gamma: float, lam: float) -> Tensor:
    """`pacd_fast.training.Macer` from the logits [B, k, C] on: equations 9 to 12 of the paper, image by image."""
    total = logits.new_zeros(())
    for copies, label in zip(logits, labels.tolist(), strict=True):
        total = total - torch.log(torch.softmax(copies, 1).mean(0)[label] + 1e-10)
        top, which = torch.softmax(beta * copies, 1).mean(0).topk(2)
        gap = torch.special.ndtri(top[0]) - torch.special.ndtri(top[1])
        if int(which[0]) == label and abs(float(gap.detach())) <= gamma:
            total = total + lam * sigma / 2 * (gamma - gap)
    return total / len(logits)


def pgd(model, x: Tensor, y: Tensor, noise: Tensor, epsilon: float, steps: int) -> Tensor:
    """The perturbation of `pacd_fast.training.SmoothAdv`, image by image; noise [B, k, ...] is what is added to x."""
    found = torch.zeros_like(x)
    for i in range(len(x)):
        delta = torch.zeros_like(x[i])
        for _ in range(steps):
            delta.requires_grad_()
            likelihood = torch.softmax(model(x[i] + delta + noise[i]), 1).mean(0)[y[i]]
            (slope,) = torch.autograd.grad(-likelihood.log(), delta)
            delta = delta.detach() + 2 * epsilon / steps * slope / slope.norm()
            delta = (x[i] + delta).clamp(0, 1) - x[i]
            delta = delta * min(1.0, epsilon / float(delta.norm()))
        found[i] = delta
    return found


def bernstein_lower(draws: np.ndarray, alpha: float) -> float:
    """`pacd_fast.soft.bernstein_lower` from the draws themselves, not rounded outward."""
    n, t = len(draws), np.log(2 / alpha)
    return float(draws.mean() - np.sqrt(2 * draws.var(ddof=1) * t / n) - 7 * t / (3 * (n - 1)))


class Smooth:
    """CERTIFY as it was published (Cohen et al. 2019), written plainly: the baseline of every speed figure."""

    def __init__(self, base_classifier, num_classes: int, sigma: float):
        self.base_classifier, self.num_classes, self.sigma = base_classifier, num_classes, sigma

    def certify(self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int = 1000) -> tuple[int, float]:
        self.base_classifier.eval()
        selected = int(self.sample_noise(x, n0, batch_size).argmax())
        hits = int(self.sample_noise(x, n, batch_size)[selected])
        p_lower = float(proportion_confint(hits, n, alpha=2 * alpha, method="beta")[0])
        return (-1, 0.0) if p_lower < 0.5 else (selected, self.sigma * float(norm.ppf(p_lower)))

    def sample_noise(self, x: Tensor, num: int, batch_size: int) -> np.ndarray:
        with torch.no_grad():
            counts = np.zeros(self.num_classes, dtype=int)
            while num > 0:
                this = min(batch_size, num)
                num -= this
                batch = x.repeat((this, *[1] * x.dim()))
                noise = torch.randn_like(batch) * self.sigma
                for prediction in self.base_classifier(batch + noise).argmax(1).cpu().numpy():
                    counts[prediction] += 1
            return counts
