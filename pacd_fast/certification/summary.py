"""What certifications come to: average radius, certified accuracy at radii, side by side and over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacd_fast.certification.rows import ABSTAIN, Results, Run
from pacd_fast.tables import aligned, mean_and_deviation

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the lower bounds on p_A, and of samples
FLOATS = "noise in floats: these certificates do not hold in floating point"


@dataclass(frozen=True)
class Summary:
    """What a certification comes to. All but images and abstentions are averages over all images.

    acr: average certified radius, counting 0 for wrong and abstained. aca: fraction with the right class and a radius
    above 0. clean_accuracy: fraction with the right class, the accuracy of the smoothed classifier where abstaining
    counts as wrong. certified_accuracy[i]: fraction with the right class and a radius of at least radii[i].
    p_lower_quantiles: of the lower bounds on p_A, abstained images among them; None where the file has none.
    samples, samples_quantiles: estimation samples an image, mean and quantiles; None where the file does not say.
    warning: what a reader must know about the certificates; None if nothing.
    """

    images: int
    acr: float
    aca: float
    clean_accuracy: float
    abstentions: int
    radii: tuple[float, ...]
    certified_accuracy: tuple[float, ...]
    p_lower_quantiles: dict[float, float] | None
    samples: float | None
    samples_quantiles: dict[float, float] | None
    warning: str | None
    run: Run | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; the quantiles' keys are text."""
        values = dataclasses.asdict(self)
        for name in ("p_lower_quantiles", "samples_quantiles"):
            if values[name] is not None:
                values[name] = {str(q): value for q, value in values[name].items()}
        return values


def summarize(results: Results, radii: Sequence[float] | None = None, target_class: int | None = None) -> Summary:
    """Average over the images, or over those of one class.

    radii: where to give the certified accuracy; by default 0, 0.25, ... up to the largest radius of a right class,
        in wider steps where that is above 10.
    Raises ValueError where no image has this class, or a radius is negative or not finite.
    """
    if target_class is not None:
        results = results.of_class(target_class)
    certified = np.where(results.correct, results.radius, 0.0)
    radii = _grid([results]) if radii is None else tuple(float(radius) for radius in radii)
    if not all(math.isfinite(radius) and radius >= 0 for radius in radii):
        raise ValueError(f"radii must be finite and not negative, got {', '.join(map(str, radii))}")
    samples = results.samples
    floats = results.run is None or results.run.noise == "float"
    return Summary(
        images=len(results),
        acr=float(certified.mean()),
        aca=float((certified > 0).mean()),
        clean_accuracy=float(results.correct.mean()),
        abstentions=int((results.predict == ABSTAIN).sum()),
        radii=radii,
        certified_accuracy=tuple(float((results.correct & (results.radius >= radius)).mean()) for radius in radii),
        p_lower_quantiles=_quantiles(results.p_lower),
        samples=None if samples is None else float(samples.mean()),
        samples_quantiles=_quantiles(samples),
        warning=FLOATS if floats else None,
        run=results.run,
    )


def summary_table(
    results: Mapping[str, Results],
    radii: Sequence[float] | None = None,
    target_class: int | None = None,
    over_seeds: bool = False,
) -> str:
    """The summaries of several certifications side by side, as text: a line per quantity, a column per name.

    over_seeds: a last column with mean and standard deviation over the others, for victims that differ in their seed.
    """
    if target_class is not None:
        results = {name: result.of_class(target_class) for name, result in results.items()}
    radii = _grid(list(results.values())) if radii is None else radii
    summaries = [summarize(result, radii) for result in results.values()]
    over_seeds = over_seeds and len(summaries) > 1
    lines = [["", *results, *(["mean±sd"] if over_seeds else [])]]

    def add(label: str, values: Sequence[float | None], form: str) -> None:
        known = [value for value in values if value is not None]
        cells = ["-" if value is None else f"{value:{form}}" for value in values]
        lines.append([label, *cells, *([mean_and_deviation(known, form if form != "d" else ".1f")] * over_seeds)])

    add("images", [s.images for s in summaries], "d")
    add("ACR", [s.acr for s in summaries], ".4f")
    add("ACA (radius > 0)", [s.aca for s in summaries], ".2%")
    add("clean accuracy", [s.clean_accuracy for s in summaries], ".2%")
    add("abstained", [s.abstentions for s in summaries], "d")
    for i, radius in enumerate(summaries[0].radii if summaries else ()):
        label = f"{radius:g}" if float(f"{radius:g}") == radius else repr(radius)  # never rounded up
        add(f"certified at {label}", [s.certified_accuracy[i] for s in summaries], ".2%")
    if any(s.p_lower_quantiles is not None for s in summaries):
        for q in QUANTILES:
            known = (s.p_lower_quantiles for s in summaries)
            down = [None if each is None else _down(each[q]) for each in known]
            add(f"p_A quantile {q:g}", down, ".6f")
    if any(s.samples is not None for s in summaries):
        add("samples an image", [s.samples for s in summaries], ".0f")
        full = [s.run.n / s.samples if s.run and s.samples else None for s in summaries]
        add("n / samples", full, ".3g")
        for q in QUANTILES:
            add(
                f"samples quantile {q:g}",
                [None if s.samples_quantiles is None else s.samples_quantiles[q] for s in summaries],
                ".0f",
            )
    floats = [name for name, s in zip(results, summaries, strict=True) if s.warning]
    return "\n".join([aligned(lines), *([f"{', '.join(floats)}: {FLOATS}"] if floats else [])])


def _quantiles(values: NDArray[Any] | None) -> dict[float, float] | None:
    if values is None:
        return None
    return {q: float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def _down(value: float) -> float:
    """To six decimals, down: a bound below 1 is not printed as 1."""
    return math.floor(value * 1e6 + 1e-6) / 1e6


def _grid(results: Sequence[Results]) -> tuple[float, ...]:
    largest = max((float(r.radius[r.correct].max(initial=0.0)) for r in results), default=0.0)
    step = 0.25 * max(1, math.ceil(largest / 10))  # a row stays readable, and a radius of 1e300 is no memory bomb
    return tuple(step * i for i in range(int(largest / step) + 1))
