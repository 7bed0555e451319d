"""The tensor operators: loads the compiled libraries; per operator a typed wrapper, its fake and its gradient.

Each works by itself on CPU and CUDA tensors, under autograd and torch.compile, and raises ValueError on bad input.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

import pacd_fast

__all__ = [
    "add_votes_",
    "chernoff_newton",
    "chernoff_newton_pairs",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "cuda_library",
    "max_pool_relu",
    "noisy_copies",
    "normal_quantile",
    "soft_radius",
    "soft_smooth",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SOFT_FLOATS = (*FLOATS, torch.float64)
REBUILD = "build it with: pip install --no-build-isolation --force-reinstall --no-deps ."


def _library(name: str) -> Path | None:
    """The path of a compiled library; an editable install has it beside another entry of the package's path."""
    for folder in pacd_fast.__path__:
        path = Path(folder) / f"{name}.so"
        if path.exists():
            return path
    spec = importlib.util.find_spec("pacd_fast._C")
    if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / f"{name}.so").exists():
        return path
    return None


def _load(name: str) -> None:
    path = _library(name)
    if path is None:
        raise ImportError(f"pacd_fast's library {name}.so is not in {list(pacd_fast.__path__)}; {REBUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"pacd_fast's library {path} does not load beside torch {torch.__version__} ({error}); {REBUILD}"
        ) from error


def _load_cuda() -> str:
    """Loads the CUDA operators; returns "loaded", or the reason why they are not there."""
    if torch.version.cuda is None:
        return f"not loaded: torch {torch.__version__} has no CUDA"
    if _library("pacd_ops_cuda") is None:
        return f"not built: no nvcc was found when pacd_fast was built; with nvcc on PATH, {REBUILD}"
    _load("pacd_ops_cuda")
    return "loaded"


_load("pacd_ops")
cuda_library: str = _load_cuda()
"""Either "loaded" or the reason why there are no CUDA operators."""

_ops = torch.ops.pacd_fast


def _require(condition: bool, message: str | Callable[[], str]) -> None:
    """A message with numbers in it is a function: it costs nothing where all is well, and compiles where they vary."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def _require_device(x: Tensor) -> None:
    if x.device.type == "cuda" and cuda_library != "loaded":
        raise ValueError(f"the CUDA operators are {cuda_library}")
    _require(x.device.type in ("cpu", "cuda", "meta"), lambda: f"expected a CPU or CUDA tensor, not one on {x.device}")


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward mode looks on: these know torch's operators, and not ours."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _channel_numbers(values: Sequence[float] | Tensor | None, name: str, x: Tensor) -> Tensor | None:
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32, device=x.device).flatten()
    _require(
        x.dim() >= 2 and tensor.numel() == x.shape[1],
        lambda: f"{name} needs one number per channel of x {tuple(x.shape)}",
    )
    return tensor


def noisy_copies(
    x: Tensor,
    sigma: float,
    copies: int = 1,
    seed: int = 0,
    *,
    first: int = 0,
    image_ids: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gaussian copies of images: x [B, ...] -> [B * copies, ...], the copies of one image adjacent.

    In plain torch ``x.repeat_interleave(copies, 0) + sigma * torch.randn(...)``, then ``(. - mean) * (1 / std)`` per
    channel where they are given.  The noise is a pure function of (seed, stream, image id, sample, element): copy j of
    image b is sample ``first + j`` of image ``image_ids[b]``, whatever the batch, device, layout or number of threads.

    Args:
        x: float32, bfloat16 or float16 [B, ...], any strides; computed in float32.
        sigma: standard deviation, in the units of x, not negative; used as the nearest float32.
        copies: copies per image, at least 1.
        seed: in [0, 2^63); first: number of the first sample, samples are numbered in [0, 2^32); stream: in [0, 2^16),
            0 and 1 are certification's selection and estimation.
        image_ids: int64 [B] in [0, 2^48), by default 0, 1, ..., B - 1.
        dtype: of the result, float32, bfloat16 or float16; by default that of x.
        memory_format: torch.contiguous_format (default) or torch.channels_last.
        mean, std: one number per channel (dimension 1), together or not at all.
        out: [B * copies, ...], contiguous or channels_last: written and returned instead of a new tensor; then dtype
            and memory_format are its own, and there is no gradient.

    The gradient with respect to x is the sum over copies (divided by std).  A draw reaches 6.76 sigma at most: a 32-bit
    uniform in Box-Muller (generator: Philox4x32-10, Salmon et al. 2011).

    Raises:
        ValueError: for anything outside these ranges.
    """
    _require_device(x)
    _require(
        x.dim() >= 1 and x.dtype in FLOATS,
        lambda: f"x must be float32, bfloat16 or float16 [B, ...], not {x.dtype} {tuple(x.shape)}",
    )
    _require(math.isfinite(sigma) and sigma >= 0, lambda: f"sigma must be finite and not negative, not {sigma}")
    _require(copies >= 1, lambda: f"copies must be at least 1, not {copies}")
    _require(0 <= seed < 2**63, lambda: f"seed must be in [0, 2^63), not {seed}")
    _require(
        first >= 0 and first + copies <= 2**32,
        lambda: f"samples are numbered 0 to 2^32 - 1, not {first} to {first + copies - 1}",
    )
    _require(0 <= stream < 2**16, lambda: f"stream must be in [0, 2^16), not {stream}")
    if image_ids is not None:
        _require(
            image_ids.dtype == torch.int64 and image_ids.shape == x.shape[:1] and image_ids.device == x.device,
            lambda: f"image_ids must be int64 [{x.shape[0]}] on {x.device}",
        )
    _require((mean is None) == (std is None), "mean and std come together")
    shift, spread = _channel_numbers(mean, "mean", x), _channel_numbers(std, "std", x)
    pixels = x if x.dtype == torch.float32 else x.float()
    if out is not None:
        _require(dtype is None and memory_format is None, "out has its own dtype and memory_format")
        _require(
            out.dtype in FLOATS and out.device == x.device and out.shape == (x.shape[0] * copies, *x.shape[1:]),
            lambda: (
                f"out must be {(len(x) * copies, *x.shape[1:])} on {x.device}, not {tuple(out.shape)} on {out.device}"
            ),
        )
        _require(
            out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)),
            "out must be contiguous or channels_last",
        )
        if out.numel() > 0:
            _ops.noisy_copies_(out, pixels, image_ids, float(sigma), seed, first, stream, shift, spread)
        return out
    dtype = x.dtype if dtype is None else dtype
    _require(dtype in FLOATS, lambda: f"dtype must be float32, bfloat16 or float16, not {dtype}")
    last = memory_format == torch.channels_last
    _require(
        last or memory_format in (None, torch.contiguous_format),
        lambda: f"memory_format must be contiguous or channels_last, not {memory_format}",
    )
    _require(not last or x.dim() == 4, "channels_last needs x [B, C, H, W]")
    if x.numel() == 0:
        return x.new_empty((x.shape[0] * copies, *x.shape[1:]), dtype=dtype)
    numbers = (image_ids, float(sigma), copies, seed, first, stream, dtype, last, shift, spread)
    if not transformed(x):
        return _ops.noisy_copies(pixels, *numbers)
    plain = pixels if spread is None else pixels / spread.reshape(1, -1, *[1] * (x.dim() - 2))
    slope = (plain - plain.detach()).repeat_interleave(copies, 0)  # 0, with x's derivative
    noisy = _ops.noisy_copies(pixels.detach(), *numbers) + slope.to(dtype)
    return noisy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def add_votes_(counts: Tensor, logits: Tensor, image_index: Tensor) -> Tensor:
    """Votes: counts[image_index[m], argmax(logits[m])] += 1 for every row m, in one pass; the lowest index wins a tie.

    In plain torch ``counts.index_put_((image_index, logits.argmax(1)), one, accumulate=True)``.

    Args:
        counts: int64 [N, classes], contiguous, changed in place.
        logits: float32, bfloat16 or float16 [M, classes].
        image_index: int64 [M] in [0, N).  On the CPU an index outside raises; on CUDA its row is left out.

    Returns:
        int64 [N]: per image the rows that hold a NaN.  They are counted here and never voted.

    Raises:
        ValueError: for wrong shapes, dtypes or devices.
    """
    _require_device(counts)
    _require(
        counts.dtype == torch.int64 and counts.dim() == 2 and counts.is_contiguous(),
        "counts must be a contiguous int64 [N, classes]",
    )
    _require(
        logits.dim() == 2 and logits.shape[1] == counts.shape[1] and logits.shape[1] > 0 and logits.dtype in FLOATS,
        lambda: (
            f"logits must be float32, bfloat16 or float16 [M, {counts.shape[1]}], "
            f"not {logits.dtype} {tuple(logits.shape)}"
        ),
    )
    _require(
        image_index.dtype == torch.int64 and image_index.shape == logits.shape[:1],
        lambda: f"image_index must be int64 [{logits.shape[0]}]",
    )
    _require(
        counts.device == logits.device == image_index.device, "counts, logits and image_index must be on one device"
    )
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and image_index.numel() > 0:
        low, high = image_index.aminmax()
        _require(
            0 <= int(low) and int(high) < counts.shape[0], lambda: f"image_index must be in [0, {counts.shape[0]})"
        )
    return _ops.add_votes_(counts, logits.detach(), image_index)


def tally_votes(counts: Tensor, logits: Tensor, image_index: Tensor) -> None:
    """`add_votes_` without its checks, for loops that made image_index themselves."""
    _ops.add_votes_(counts, logits, image_index)


def _clopper_pearson(k: Tensor, n: Tensor | int, alpha: Tensor | float, upper: bool) -> Tensor:
    _require_device(k)
    _require(k.dtype == torch.int64, lambda: f"k must be int64, not {k.dtype}")
    n = torch.as_tensor(n, dtype=torch.int64, device=k.device)
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=k.device)
    k, n, alpha = torch.broadcast_tensors(k, n, alpha)
    if not torch.compiler.is_compiling():
        _require(bool(((n >= 1) & (n < 2**31)).all()), "n must be in [1, 2^31)")
        _require(bool(((k >= 0) & (k <= n)).all()), "k must be in [0, n]")
        _require(bool(((alpha >= 1e-200) & (alpha <= 1 - 2**-20)).all()), "alpha must be in [1e-200, 1 - 2^-20]")
    return _ops.clopper_pearson(k.contiguous(), n.contiguous(), alpha.contiguous(), upper)


def clopper_pearson_lower(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """The one-sided Clopper-Pearson lower bound of a proportion at level 1 - alpha, rounded down.

    The p with P(Binomial(n, p) >= k) = alpha, ``scipy.stats.beta.ppf(alpha, k, n - k + 1)``; 0 where k = 0.  Never
    above the exact bound and within 2 ULP of it (Clopper and Pearson 1934).

    Args:
        k: int64, any shape, 0 <= k <= n; n: 1 <= n < 2^31 and alpha: 1e-200 <= alpha <= 1 - 2^-20, numbers or tensors
            that broadcast with k.  Under torch.compile nothing is checked and a bound outside its range is NaN.

    Returns:
        float64 of the broadcast shape.

    Raises:
        ValueError: for anything outside these ranges.
    """
    return _clopper_pearson(k, n, alpha, False)


def clopper_pearson_upper(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """The one-sided Clopper-Pearson upper bound of a proportion at level 1 - alpha, rounded up.

    The p with P(Binomial(n, p) <= k) = alpha, ``scipy.stats.beta.ppf(1 - alpha, k + 1, n - k)``; 1 where k = n.
    Arguments, result and errors as for `clopper_pearson_lower`.
    """
    return _clopper_pearson(k, n, alpha, True)


def normal_quantile(p: Tensor, *, rounding: str = "down") -> Tensor:
    """Phi^-1(p), the standard normal quantile, rounded ``"down"`` or ``"up"``: ``torch.special.ndtri`` as a bound.

    Args:
        p: float64, any shape, in [0, 1]; 0 and 1 give -inf and inf, anything outside NaN.

    Returns:
        float64 of the same shape, never on the wrong side of the exact quantile and within 1 ULP of it for
        p in [1e-280, 1).

    Raises:
        ValueError: for another dtype or rounding.
    """
    _require_device(p)
    _require(p.dtype == torch.float64, lambda: f"p must be float64, not {p.dtype}")
    _require(rounding in ("down", "up"), lambda: f'rounding must be "down" or "up", not {rounding!r}')
    return _ops.normal_quantile(p.contiguous(), rounding == "up")


def _require_votes(alpha: Tensor, y: Tensor, classes: int, q: float) -> None:
    _require_device(alpha)
    _require(
        alpha.dtype == torch.float64 and alpha.dim() == 2,
        lambda: f"alpha must be float64 [m, n], not {alpha.dtype} {tuple(alpha.shape)}",
    )
    _require(
        y.dtype == torch.int64 and y.shape == alpha.shape[1:] and y.device == alpha.device,
        lambda: f"y must be int64 [{alpha.shape[1]}] on {alpha.device}, not {y.dtype} {tuple(y.shape)} on {y.device}",
    )
    _require(
        1e-300 <= q < (classes - 1) / classes,
        lambda: f"q must be in (0, {classes - 1}/{classes}) for {classes} classes, not {q}",
    )
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel() > 0:
        low, high = y.aminmax()
        _require(
            0 <= int(low) and int(high) < classes,
            lambda: f"labels must be 0 to {classes - 1}, not {int(low)} to {int(high)}",
        )


def chernoff_newton(alpha: Tensor, y: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """Chernoff's bound on a linear vote under random label flips, optimised: (t [m], log_tail [m]).

    Flip each label of y with probability q; the base classifier says 1 where ``alpha @ y >= 1/2``.  The probability
    that it does not say what it says most often, ``1[t >= 0]``, is at most exp(log_tail).  In plain torch, for t > 0,
    ``log_tail = t / 2 + log((1 - q) * exp(-t * alpha * y) + q * exp(-t * alpha * (1 - y))).sum(-1)`` at the t that
    minimises it, and the same formula for t < 0 (Rosenfeld et al. 2020, equation 6).

    log_tail is rounded up: never below the formula's exact value at the returned t, which is a bound for every t, and
    within 1e-12 relative of the optimum where it says more than 1/2.  It can exceed 0 by its rounding allowance (1e-15)
    where nothing can be said.  A double is enough for every q.  Results do not depend on batch, threads or device.  No
    gradient.

    Args:
        alpha: float64 [m, n]: the influence of each label on each test point; a row with NaN or infinity gives NaN.
        y: int64 [n] of 0 and 1 (checked on the CPU; on CUDA anything but 1 counts as 0).
        q: in (0, 1/2), at least 1e-300.

    Raises:
        ValueError: for anything outside these ranges.
    """
    _require_votes(alpha, y, 2, q)
    return _ops.chernoff_newton(alpha.detach().contiguous(), y.contiguous(), float(q))


def chernoff_newton_pairs(alpha: Tensor, y: Tensor, pairs: Tensor, q: float, classes: int) -> tuple[Tensor, Tensor]:
    """`chernoff_newton` for pairs of K classes: (t [m, P], log_tail [m, P]).

    A label stays with probability 1 - q and else becomes one of the K - 1 others, all alike.  For the pair (c, d) the
    vote is ``D = (alpha * ((y == c).double() - (y == d).double())).sum(-1)``.  Where t >= 0, P(D <= 0) <=
    exp(log_tail); where t <= 0, P(D >= 0) <= exp(log_tail).  Rounding as for `chernoff_newton`.

    Args:
        alpha: float64 [m, n].
        y: int64 [n], 0 to classes - 1.
        pairs: int64 [m, P, 2] of two different classes each: any P pairs for every row, in one launch.
        q: in (0, (classes - 1) / classes), at least 1e-300.

    Raises:
        ValueError: for anything outside these ranges.
    """
    _require(classes >= 2, lambda: f"classes must be at least 2, not {classes}")
    _require_votes(alpha, y, classes, q)
    _require(
        pairs.dtype == torch.int64 and pairs.dim() == 3 and pairs.shape[0] == alpha.shape[0] and pairs.shape[2] == 2,
        lambda: f"pairs must be int64 [{alpha.shape[0]}, P, 2], not {pairs.dtype} {tuple(pairs.shape)}",
    )
    _require(pairs.device == alpha.device, "pairs must be on the device of alpha")
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling() and pairs.numel() > 0:
        low, high = pairs.aminmax()
        _require(0 <= int(low) and int(high) < classes, lambda: f"pairs must hold classes 0 to {classes - 1}")
        _require(bool((pairs[..., 0] != pairs[..., 1]).all()), "a pair must be two different classes")
    return _ops.chernoff_newton_pairs(
        alpha.detach().contiguous(), y.contiguous(), pairs.contiguous(), float(q), classes
    )


def max_pool_relu(x: Tensor) -> Tensor:
    """2x2 max-pooling with stride 2, then ReLU: x [N, C, H, W] -> [N, C, H // 2, W // 2], in one pass.

    In plain torch ``relu(max_pool2d(x, 2))``, with the same bits and, by backward passes, dual numbers and vmap,
    derivatives of every order.  For the way back a byte a window is kept, and not x.

    Args:
        x: float32, float64, bfloat16 or float16; quick where it is in channels_last, as the result is, else copied.

    Raises:
        ValueError: for wrong shapes or dtypes.  A window with a NaN gives NaN.
    """
    _require_device(x)
    _require(
        x.dim() == 4 and min(x.shape[2:]) >= 2 and x.dtype in SOFT_FLOATS,
        lambda: f"x must be floating [N, C, H, W] with H, W >= 2, not {x.dtype} {tuple(x.shape)}",
    )
    if torch.compiler.is_compiling():
        return torch.relu(torch.nn.functional.max_pool2d(x, 2))  # the compiler's own fusion, and no break
    if torch.is_inference_mode_enabled():
        return _ops.pool_max(x)
    return _Pool.apply(x)[0]


class _Pool(torch.autograd.Function):
    """pool_choose: the pooled numbers, linear in x where the choice is given, and the choice."""

    @staticmethod
    def forward(x):
        return _ops.pool_choose(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,), (_, choice) = inputs, output
        ctx.size = tuple(x.shape[2:])
        ctx.mark_non_differentiable(choice)
        ctx.save_for_backward(choice)
        ctx.save_for_forward(choice)

    @staticmethod
    def backward(ctx, grad, _):
        return _Choice.apply(ctx.saved_tensors[0], grad, ctx.size)

    @staticmethod
    def jvp(ctx, tangent):
        return _Choice.apply(ctx.saved_tensors[0], tangent, None), None

    @staticmethod
    def vmap(info, in_dims, x):
        """The stacked dimension goes into that of the images, and out again."""
        found = _Pool.apply(x.movedim(in_dims[0], 0).flatten(0, 1))
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0, 0)


class _Choice(torch.autograd.Function):
    """pool_pick(choice, other) or, given a size, pool_spread: linear in other, and each other's transpose."""

    @staticmethod
    def forward(choice, other, size):
        return _ops.pool_pick(choice, other) if size is None else _ops.pool_spread(choice, other, *size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        choice, other, size = inputs
        ctx.size, ctx.transposed = size, tuple(other.shape[2:]) if size is None else None
        ctx.save_for_backward(choice)
        ctx.save_for_forward(choice)

    @staticmethod
    def backward(ctx, grad):
        return None, _Choice.apply(ctx.saved_tensors[0], grad, ctx.transposed), None

    @staticmethod
    def jvp(ctx, _, tangent, __):
        return _Choice.apply(ctx.saved_tensors[0], tangent, ctx.size)

    @staticmethod
    def vmap(info, in_dims, choice, other, size):
        count = info.batch_size
        moved = [
            (t.unsqueeze(0).expand(count, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
            for t, d in zip((choice, other), in_dims[:2], strict=True)
        ]
        return _Choice.apply(*moved, size).unflatten(0, (count, -1)), 0


def _soft_arguments(logits: Tensor, beta: float) -> Tensor:
    _require_device(logits)
    _require(
        logits.dim() == 3 and min(logits.shape[1], logits.shape[2] - 1) >= 1 and logits.dtype in SOFT_FLOATS,
        lambda: f"logits must be floating [B, k, C] with k >= 1 and C >= 2, not {logits.dtype} {tuple(logits.shape)}",
    )
    _require(math.isfinite(beta) and beta > 0, lambda: f"beta must be positive and finite, not {beta}")
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def soft_smooth(logits: Tensor, beta: float = 1.0) -> Tensor:
    """The soft smoothed classifier: logits [B, k, C] of k noisy copies -> probabilities [B, C], in one pass.

    In plain torch ``softmax(beta * logits, 2).mean(1)``.  Differentiable as often as wanted.

    Args:
        logits: float32 or float64; bfloat16 and float16 are computed, and returned, in float32.
        beta: inverse temperature, positive.

    Raises:
        ValueError: for wrong shapes, dtypes or numbers.  An image with a NaN gets NaN.
    """
    values = _soft_arguments(logits, beta)
    return _plain_smooth(values, beta) if transformed(values) else _ops.soft_smooth(values, float(beta))


def _plain_smooth(logits: Tensor, beta: float) -> Tensor:
    return torch.softmax(beta * logits, 2).mean(1)


def soft_radius(logits: Tensor, labels: Tensor, *, beta: float, sigma: float, squeeze: float = 0.001) -> Tensor:
    """The certified radius of the soft smoothed classifier: logits [B, k, C], labels [B] -> [B], in one pass.

    With p1 >= p2 the two largest of ``soft_smooth(logits, beta)`` and a = squeeze, ``sigma / 2 * (ndtri((1 - 2 * a) *
    p1 + a) - ndtri((1 - 2 * a) * p2 + a))`` where the likeliest class is the label, 0 where it is not (PACD, Mehra et
    al. 2021, as its authors ran it; with squeeze = 0 the radius in MACER, Zhai et al. 2020).  Differentiable as often
    as wanted.

    Args:
        logits: float32 or float64 [B, k, C]; bfloat16 and float16 are computed, and returned, in float32.
        labels: int64 [B] in [0, C).  On CUDA, under torch.compile and torch.func, one outside is a wrong prediction.
        beta: inverse temperature, positive; sigma: the copies' noise level, positive.
        squeeze: in [0, 1/2), keeps Phi^-1 finite.  With 0 the radius is infinite where all classes but one underflow,
            and the gradient there is 0.

    Raises:
        ValueError: for wrong shapes, dtypes or numbers.  An image with a NaN gets NaN.
    """
    values = _soft_arguments(logits, beta)
    _require(
        labels.dtype == torch.int64 and labels.shape == logits.shape[:1] and labels.device == logits.device,
        lambda: (
            f"labels must be int64 [{logits.shape[0]}] on {logits.device}, "
            f"not {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        ),
    )
    _require(math.isfinite(sigma) and sigma > 0, lambda: f"sigma must be positive and finite, not {sigma}")
    _require(0 <= squeeze < 0.5, lambda: f"squeeze must be in [0, 1/2), not {squeeze}")
    arguments = (values, labels, float(beta), float(sigma), float(squeeze))
    if torch.compiler.is_compiling():
        return _ops.soft_radius(*arguments)[0]
    if transformed(values):
        return _plain_radius(*arguments)
    try:
        return _ops.soft_radius(*arguments)[0]
    except RuntimeError as error:
        found = re.search(r"labels must be in .*", str(error))
        raise error if found is None else ValueError(found[0]) from None


def _farthest(logits: Tensor) -> int:
    """Where the slope of Phi^-1 overflows, and the kernel takes 0."""
    return 12 if logits.dtype == torch.float32 else 37


def _plain_radius(logits: Tensor, labels: Tensor, beta: float, sigma: float, squeeze: float) -> Tensor:
    p, which = _plain_smooth(logits, beta).topk(2, 1)
    scaled = (1 - 2 * squeeze) * p + squeeze
    constant = torch.special.ndtri(scaled.detach())
    steep = ~(constant.abs() < _farthest(logits))
    z = torch.where(steep, constant, torch.special.ndtri(torch.where(steep, 0.5, scaled)))
    radius = torch.where(which[:, 0] == labels, sigma / 2 * (z[:, 0] - z[:, 1]), 0.0)
    return torch.where(p.isnan().any(1), math.nan, radius)


# What the compiler needs: shapes without data, and gradients.


@torch.library.register_fake("pacd_fast::noisy_copies_")
def _(out, x, image_ids, sigma, seed, first, stream, mean, std):
    return None


@torch.library.register_fake("pacd_fast::noisy_copies")
def _(x, image_ids, sigma, copies, seed, first, stream, dtype, channels_last, mean, std):
    shape = (x.shape[0] * copies, *x.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


@torch.library.register_fake("pacd_fast::add_votes_")
def _(counts, logits, image_index):
    return counts.new_empty(counts.shape[:1])


@torch.library.register_fake("pacd_fast::clopper_pearson")
def _(k, n, alpha, upper):
    return k.new_empty(k.shape, dtype=torch.float64)


@torch.library.register_fake("pacd_fast::normal_quantile")
def _(p, up):
    return torch.empty_like(p, memory_format=torch.contiguous_format)


@torch.library.register_fake("pacd_fast::chernoff_newton")
def _(alpha, y, q):
    return alpha.new_empty(alpha.shape[:1]), alpha.new_empty(alpha.shape[:1])


@torch.library.register_fake("pacd_fast::chernoff_newton_pairs")
def _(alpha, y, pairs, q, classes):
    return alpha.new_empty(pairs.shape[:2]), alpha.new_empty(pairs.shape[:2])


def _noisy_copies_setup(ctx, inputs, output):
    x, _, _, copies, *_, std = inputs
    ctx.copies, ctx.shape, ctx.std = copies, x.shape, std


def _noisy_copies_backward(ctx, grad):
    summed = grad.float().reshape(ctx.shape[0], ctx.copies, *ctx.shape[1:]).sum(1)
    if ctx.std is not None:
        summed = summed * (1 / ctx.std).reshape(1, -1, *[1] * (len(ctx.shape) - 2))
    return summed, *[None] * 10


torch.library.register_autograd("pacd_fast::noisy_copies", _noisy_copies_backward, setup_context=_noisy_copies_setup)


@torch.library.register_fake("pacd_fast::narrow_grad")
def _(grad, filters, height, width):
    return grad.new_empty((grad.shape[0], 1, height, width), dtype=torch.float32)


@torch.library.register_fake("pacd_fast::convolve3x3")
def _(x, weight, bias, transposed):
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _last(like: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@torch.library.register_fake("pacd_fast::pool_max")
def _(x):
    return _last(x, x.shape[2] // 2, x.shape[3] // 2, x.dtype)


@torch.library.register_fake("pacd_fast::pool_choose")
def _(x):
    return tuple(_last(x, x.shape[2] // 2, x.shape[3] // 2, dtype) for dtype in (x.dtype, torch.uint8))


@torch.library.register_fake("pacd_fast::pool_pick")
def _(choice, other):
    return _last(other, other.shape[2] // 2, other.shape[3] // 2, other.dtype)


@torch.library.register_fake("pacd_fast::pool_spread")
def _(choice, grad, height, width):
    return _last(grad, height, width, grad.dtype)


@torch.library.register_fake("pacd_fast::soft_smooth")
def _(logits, beta):
    return logits.new_empty((logits.shape[0], logits.shape[2]))


@torch.library.register_fake("pacd_fast::soft_smooth_backward")
def _(grad, logits, beta):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("pacd_fast::soft_radius")
def _(logits, labels, beta, sigma, squeeze):
    return logits.new_empty(logits.shape[:1]), logits.new_empty((logits.shape[0], logits.shape[2]))


@torch.library.register_fake("pacd_fast::soft_radius_backward")
def _(grad, logits, mean, labels, beta, sigma, squeeze):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# First derivatives are fused operators; theirs are plain torch, which is differentiable in its turn.


def _soft_smooth_setup(ctx, inputs, output):
    logits, ctx.beta = inputs
    ctx.save_for_backward(logits)


def _soft_smooth_backward(ctx, grad):
    return _ops.soft_smooth_backward(grad, ctx.saved_tensors[0], ctx.beta), None


def _soft_smooth_backward_setup(ctx, inputs, output):
    grad, logits, ctx.beta = inputs
    ctx.save_for_backward(grad, logits)


def _soft_smooth_double_backward(ctx, cotangent):
    """Of G = beta / k * p * (grad - <p, grad>), with respect to grad and logits."""
    (grad, logits), beta = ctx.saved_tensors, ctx.beta
    p, slopes = torch.softmax(beta * logits, 2), grad.unsqueeze(1)
    scale = beta / logits.shape[1]
    inner, along = (p * slopes).sum(2, keepdim=True), (p * cotangent).sum(2, keepdim=True)
    to_grad = scale * (p * (cotangent - along)).sum(1)
    to_p = cotangent * (slopes - inner) - along * slopes
    return to_grad, scale * beta * p * (to_p - (p * to_p).sum(2, keepdim=True)), None


def _soft_radius_setup(ctx, inputs, output):
    logits, labels, *ctx.numbers = inputs
    ctx.save_for_backward(logits, output[1], labels)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _soft_radius_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    return _ops.soft_radius_backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 4


def _soft_radius_backward_setup(ctx, inputs, output):
    grad, logits, mean, labels, *ctx.numbers = inputs
    ctx.save_for_backward(grad, logits, mean, labels)


def _soft_radius_double_backward(ctx, cotangent):
    """Of G = soft_smooth_backward(slopes(grad, mean), logits), mean = soft_smooth(logits), through all three."""
    (grad, logits, mean, labels), (beta, sigma, squeeze) = ctx.saved_tensors, ctx.numbers
    if torch.is_grad_enabled():  # a third derivative goes through the mean too
        mean = _plain_smooth(logits, beta)
    p, which = mean.topk(2, 1)
    right, keep = which[:, :1] == labels.unsqueeze(1), 1 - 2 * squeeze
    z = torch.special.ndtri(keep * p + squeeze)
    safe = right & (z.abs() < _farthest(logits))
    z = torch.where(safe, z, 0.0)
    sign = z.new_tensor([sigma / 2, -sigma / 2])
    slope = torch.where(safe, sign * keep * math.sqrt(2 * math.pi) * torch.exp(z * z / 2), 0.0)  # d radius / dp
    slopes = torch.zeros_like(mean).scatter(1, which, slope * grad.unsqueeze(1))
    to_slopes, to_logits, _ = _soft_smooth_double_backward(_Saved((slopes, logits), beta), cotangent)
    to_slope = to_slopes.gather(1, which)
    # d slope / dp = slope^2 * z / (sigma / 2), of the slope's own sign; in float64, because slope^2 overflows float32
    # where a loss has masked the image, and inf * 0 is no 0
    curvature = torch.where(safe, slope.double().square() * z / sign, 0.0)
    to_mean = torch.zeros_like(mean).scatter(1, which, (curvature * to_slope * grad.unsqueeze(1)).to(mean.dtype))
    return (slope * to_slope).sum(1), to_logits + _ops.soft_smooth_backward(to_mean, logits, beta), *[None] * 5


class _Saved(NamedTuple):
    """What a gradient's formula reads from its context."""

    saved_tensors: tuple[Tensor, ...]
    beta: float


for _name, _setup, _backward in (
    ("soft_smooth", _soft_smooth_setup, _soft_smooth_backward),
    ("soft_smooth_backward", _soft_smooth_backward_setup, _soft_smooth_double_backward),
    ("soft_radius", _soft_radius_setup, _soft_radius_backward),
    ("soft_radius_backward", _soft_radius_backward_setup, _soft_radius_double_backward),
):
    torch.library.register_autograd(f"pacd_fast::{_name}", _backward, setup_context=_setup)
