"""How fast certification is with a user's own network on their machine, beside the published loop."""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import ops
from pacd_fast.arguments import at_least, positive
from pacd_fast.certification.classifier import BaseClassifier
from pacd_fast.certification.question import Question
from pacd_fast.certification.smooth import Smooth
from pacd_fast.certification.vote import pixels
from pacd_fast.randomness import Stream


def certification_times(
    model: nn.Module,
    images: Any,
    *,
    num_classes: int,
    sigma: float,
    n: int = 20_000,
    dtype: torch.dtype,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Seconds of n samples by the published loop (Cohen et al. 2019, batch 1000, float32), by ART's where it is
    installed, by the model alone on noise that lies ready, and by ours, eager and compiled: rows of a table.

    images: [N, ...], of which the first is used.  All contenders in turn in every round, the median of each; preparing
    and compiling are left out.  Ours draw all n samples (nothing gives up).

    Raises ValueError as `certify` does.
    """
    positive("sigma", sigma)
    at_least("n", n, 1000)
    x = pixels(images)[:1]
    device = next(model.parameters()).device
    functions: dict[str, Callable[[], object]] = {
        "published loop, float32": _published(model, x, num_classes, sigma, n)
    }
    if importlib.util.find_spec("art"):
        functions["ART, float32"] = _art(model, x, num_classes, sigma, n)
    name = str(dtype).removeprefix("torch.")
    for compiled in (False, True):
        what = f"{name}, {'compiled' if compiled else 'eager'}"
        try:
            smooth = Smooth(model, num_classes, sigma, dtype=dtype, compile=compiled, seed=0)
            classifier = smooth.prepared(x[0])
        except ValueError as error:
            warnings.warn(f"{what} is left out: {error}", stacklevel=2)
            continue
        functions[f"forward pass alone, {what}"] = _bare(classifier, n)
        functions[f"pacd_fast, {what}"] = functools.partial(smooth.draw, x[0], Question(100, n, 0.001, futility=0.0))
    times: dict[str, list[float]] = {each: [] for each in functions}
    for turn in tqdm(range(rounds + 1), unit="round", desc="bench"):
        for each, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[each].append(time.perf_counter() - started)
    medians = {each: sorted(found)[len(found) // 2] for each, found in times.items()}
    slowest = medians["published loop, float32"]
    return [
        {
            f"n = {n}": each,
            "s": seconds,
            "samples/s": n / seconds,
            "s at n = 100 000": seconds / n * 100_000,
            "times the published loop": slowest / seconds,
        }
        for each, seconds in medians.items()
    ]


def _published(model: nn.Module, x: Tensor, num_classes: int, sigma: float, n: int) -> Callable[[], object]:
    from pacd_fast.ops import reference  # it needs statsmodels

    plain = reference.Smooth(model.float().eval(), num_classes, sigma)
    here = x[0].to(next(model.parameters()).device)
    return lambda: plain.certify(here, 100, n, 0.001, 1000)


def _art(model: nn.Module, x: Tensor, num_classes: int, sigma: float, n: int) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    device = "gpu" if next(model.parameters()).is_cuda else "cpu"
    smooth = PyTorchRandomizedSmoothing(
        model=model.float().eval(), loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=num_classes,
        channels_first=True, sample_size=100, scale=sigma, alpha=0.001, device_type=device,
    )  # fmt: skip
    return lambda: smooth.certify(x.numpy().astype(np.float32), n=n, batch_size=1000)


def _bare(classifier: BaseClassifier, n: int) -> Callable[[], None]:
    """The classifier on four batches in turn: max pooling guesses its branches right on one that it knows."""
    rows, zero = classifier.engine.rows, torch.zeros(1, *classifier.shape, device=classifier.device)
    batches = [
        ops.noisy_copies(zero, 1.0, rows, first=i * rows, stream=Stream.TUNING, out=classifier.empty())
        for i in range(4)
    ]

    def run() -> None:
        for i in range(-(-n // rows)):
            classifier(batches[i % 4])

    return run
