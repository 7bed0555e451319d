"""PACD: the lower problem, what stays in the ball, attacks that bite, resuming, bad settings."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pacd_fast import certify, ops
from pacd_fast.bilevel import hypergradient
from pacd_fast.data import Dataset, as_float, load_dataset
from pacd_fast.poisoning import (
    Ball,
    Pacd,
    Poison,
    Radius,
    Recipe,
    choose,
    lower_problem,
    pacd,
    random,
    watermark,
)
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, fit

TINY = "test_pacd:tiny"  # the tests' folder is on sys.path while they run


def craft(data: Dataset, loss, *, target_class: int, epsilon: float, norm: str = "linf", **options) -> Poison:
    """pacd, with the attack's settings as keywords."""
    run = {name: options.pop(name) for name in ("checkpoint", "resume", "metrics") if name in options}
    return pacd(data, Pacd(loss, target_class, Ball(epsilon, norm), **options), **run)


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, num_classes))


def load_digits() -> Dataset:
    """Threes, fives and eights among the embedded digits at half resolution: small, and not trivial."""
    data = load_dataset("mnist5k", validation=400)
    kept = torch.tensor([3, 5, 8])

    def some(x, y):
        keep = torch.isin(y, kept)
        small = nn.functional.avg_pool2d(as_float(x[keep]), 2).mul(255).round().to(torch.uint8)
        return small, torch.searchsorted(kept, y[keep])

    (x, y), (xt, yt), (xv, yv) = (some(*data.split(which)) for which in ("train", "test", "val"))
    return Dataset("digits", x, y, xt, yt, xv, yv, ("3", "5", "8"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


RECIPE = Recipe(
    epochs=8, clean_batch=200, poison_batch=60, upper_batch=40, lower_steps=5, lower_lr=5e-3, restart=4, solver_steps=5
)


def radius_of(data: Dataset, loss, target: int, seeds=(1, 2, 3), method=Gaussian) -> tuple[float, float]:
    """Certified radius of victims from scratch, n = 500: the target class, and the other classes."""
    sums = [0.0, 0.0]
    for seed in seeds:
        torch.manual_seed(seed)
        model = fit(tiny(3), (data.x_train, data.y_train), loss, epochs=12, batch_size=100, lr=3e-3, seed=seed)
        for i, these in enumerate(((data.y_test == target), (data.y_test != target))):
            x, y = as_float(data.x_test[these][:40]), data.y_test[these][:40]
            found = certify(model, x, num_classes=3, sigma=0.4, n=500, seed=seed, batch_size=512)
            sums[i] += float((found.radius * (found.prediction == y)).mean()) / len(seeds)
    return sums[0], sums[1]


@pytest.mark.parametrize(
    "loss",
    [Standard(), Gaussian(0.5), Gaussian(0.25, 2), Macer(0.5, k=2, lam=1.0), SmoothAdv(0.25, 0.5, warmup=0)],
    ids=str,
)
def test_the_lower_problem_is_the_training_loss(digits, loss):
    network = tiny(3)
    x, y = as_float(digits.x_train[:20]), digits.y_train[:20]
    u, inner = x[15:].clone().requires_grad_(), list(network.parameters())
    ours, theirs = lower_problem(network, loss, x[:15], y, 7, u)(u, network), loss(network, x, y, seed=7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    here = torch.autograd.grad(ours, inner, create_graph=True)
    there = torch.autograd.grad(theirs, inner)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    (through,) = torch.autograd.grad(here[0].square().sum(), u)  # and the poison is in it
    assert bool((through != 0).any())


@pytest.mark.parametrize("loss", [Standard(), Gaussian(0.5, 2), SmoothAdv(0.5, 0.3)], ids=str)
def test_gauss_newton_products_of_the_lower_problem_are_positive(digits, loss):
    """For cross-entropy; MACER's loss is not convex in the logits."""
    network = tiny(3)
    x, y = as_float(digits.x_train[:30]), digits.y_train[:30]
    problem = lower_problem(network, loss, x[:20], y, 3, x[20:])
    _, found, *_ = hypergradient(
        lambda u, v: sum((w * torch.linspace(-1, 1, w.numel()).view(w.shape)).sum() for w in v.parameters()),
        problem, x[20:], network, solver="cg", damping=0.05, steps=200, tolerance=1e-4, with_solution=True,
    )  # fmt: skip
    assert found.residual <= 1e-4  # conjugate gradients stop at negative curvature, and did not


def test_the_upper_loss_is_the_soft_radius(digits):
    network = tiny(3)
    x, y = as_float(digits.x_val[:10]), digits.y_val[:10]
    ours = Radius(0.5, copies=6, beta=4.0)(network, x, y, seed=9)
    noisy = ops.noisy_copies(x, 0.5, 6, 9, stream=4)
    z = torch.softmax(4 * network(noisy).view(10, 6, 3), 2).mean(1).double().detach()
    z = (1 - 2e-3) * z + 1e-3
    best = z.clone().scatter_(1, y[:, None], 0).amax(1)
    own = z.gather(1, y[:, None]).squeeze(1)
    quantile = torch.special.ndtri
    expected = torch.where(own > best, 0.25 * (quantile(own) - quantile(best)), 0.0).mean()
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_poison_is_in_the_ball_and_says_what_it_is(digits, norm):
    epsilon = 0.1 if norm == "linf" else 1.0
    recipe = dataclasses.replace(RECIPE, epochs=2)
    made = craft(digits, Gaussian(0.4), target_class=2, epsilon=epsilon, norm=norm, model=TINY, recipe=recipe)
    used = made.distortion(digits)
    assert 0.5 * epsilon < float(used.max()) <= epsilon
    assert torch.equal(made.index, (digits.y_train == 2).nonzero().flatten())
    assert torch.equal(made.apply(digits).y_train, digits.y_train)
    assert made.settings["target_class"] == 2 and made.settings["unsolved"] == 0
    again = craft(digits, Gaussian(0.4), target_class=2, epsilon=epsilon, norm=norm, model=TINY, recipe=recipe)
    assert torch.equal(made.images, again.images)


@pytest.fixture(scope="module")
def clean_radius(digits) -> tuple[float, float]:
    return radius_of(digits, Gaussian(0.4), 2)


BITTEN = [
    pytest.param(Gaussian(0.4), marks=pytest.mark.slow),
    Macer(0.4, k=2, lam=1.0),
    SmoothAdv(0.4, 0.3, warmup=0),
]


@pytest.mark.parametrize("loss", BITTEN, ids=str)
def test_pacd_bites_and_noise_does_not(digits, clean_radius, loss):
    made = craft(digits, loss, target_class=2, epsilon=0.15, model=TINY, recipe=RECIPE, seed=5)
    control = random(digits, target_class=2, ball=Ball(0.15))
    poisoned, others = radius_of(made.apply(digits), Gaussian(0.4), 2)
    noisy, _ = radius_of(control.apply(digits), Gaussian(0.4), 2)
    clean, clean_others = clean_radius
    assert poisoned < 0.8 * clean
    assert clean - poisoned > 3 * (clean - noisy)
    assert abs(others - clean_others) < 0.25 * clean_others


def test_standard_poisoning_lowers_accuracy(digits):
    made = craft(digits, Standard(), target_class=2, epsilon=0.15, model=TINY, recipe=RECIPE)
    assert made.attack == "standard"

    def accuracy(data: Dataset) -> float:
        right = []
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            model = fit(
                tiny(3), (data.x_train, data.y_train), Standard(), epochs=12, batch_size=100, lr=3e-3, seed=seed
            )
            these = data.y_test == 2
            right.append(float((model(as_float(data.x_test[these])).argmax(1) == 2).double().mean()))
        return sum(right) / 3

    assert accuracy(made.apply(digits)) < accuracy(digits) - 0.1


def test_watermarks_and_noise(digits):
    marked = watermark(digits, target_class=1, ball=Ball(0.05), seed=3)
    base, u = as_float(digits.x_train[marked.index]), as_float(marked.images)
    delta = u - base
    assert float(delta.abs().max()) <= 0.05 and bool((delta > 0).any()) and bool((delta < 0).any())
    # where nothing was clipped the picture is 0.9 base + 0.1 of another image: it can only be darker by a tenth
    assert float((delta + 0.1 * base).min()) >= -1 / 255
    noise = random(digits, target_class=1, ball=Ball(0.05), fraction=0.25)
    assert len(noise.index) == round(0.25 * int((digits.y_train == 1).sum()))
    assert set(digits.y_train[noise.index].tolist()) == {1}
    with pytest.raises(ValueError, match="opacity must be in"):
        watermark(digits, target_class=1, ball=Ball(0.05), opacity=1.5)


def test_targets_are_attacked_by_their_nearest_neighbours(digits):
    target = int((digits.y_test == 2).nonzero()[3])
    chosen = choose(digits, 2, 0.05, [target], 0)
    assert len(chosen) == round(0.05 * len(digits.x_train))
    far = (as_float(digits.x_train) - as_float(digits.x_test[target])).flatten(1).norm(dim=1)
    far[digits.y_train != 2] = float("inf")
    assert float(far[chosen].max()) <= float(far.sort().values[len(chosen) - 1])
    recipe = dataclasses.replace(RECIPE, epochs=1, poison_batch=20)
    made = craft(
        digits, Gaussian(0.4), target_class=2, epsilon=0.1, targets=[target], fraction=0.05, model=TINY, recipe=recipe
    )
    assert made.settings["targets"] == [target] and torch.equal(made.index, chosen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_class": 7}, "no training image of digits is of class 7"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"norm": "l1"}, "unknown norm"),
        ({"fraction": 0.0}, "fraction must be in"),
        ({"fraction": 0.02}, "fewer than a poison batch of 60"),
        ({"recipe": dataclasses.replace(RECIPE, clean_batch=5000)}, "fewer than a clean batch of 5000"),
        ({"targets": [10**6]}, "target 1000000 is no test image"),
        ({"targets": [0]}, "test image 0 is of class 0, not 2"),
        ({"fraction": 0.9, "targets": [2]}, "the class has"),
    ],
)
def test_bad_arguments(digits, arguments, message):
    given = {"target_class": 2, "epsilon": 0.1, "model": TINY, "recipe": RECIPE, **arguments}
    with pytest.raises(ValueError, match=message):
        craft(digits, Gaussian(0.4), **given)


@pytest.mark.parametrize(
    "field", ["epochs", "poison_batch", "lower_steps", "solver_steps", "outer_lr", "solver", "curvature", "dtype"]
)
def test_bad_recipes(field):
    with pytest.raises(ValueError, match="must be|unknown"):
        Recipe(**{field: 0})


def test_validation_images_are_needed(digits):
    without = dataclasses.replace(digits, x_val=digits.x_val[:0], y_val=digits.y_val[:0])
    with pytest.raises(ValueError, match="validation"):
        craft(without, Gaussian(0.4), target_class=2, epsilon=0.1, model=TINY, recipe=RECIPE)


def test_a_cost_that_is_not_finite_begins_anew_and_is_counted(digits):
    calls = []

    def sometimes(model, x, y, *, seed):
        calls.append(seed)
        value = Radius(0.4, 4)(model, x, y, seed=seed)
        return value * float("nan") if len(calls) == 2 else value

    recipe = dataclasses.replace(RECIPE, epochs=2)
    made = craft(digits, Gaussian(0.4), target_class=2, epsilon=0.1, model=TINY, recipe=recipe, upper=sometimes)
    assert made.settings["restarts_nan"] == 1
    with pytest.raises(ValueError, match="not finite again and again"):
        craft(
            digits, Gaussian(0.4), target_class=2, epsilon=0.1, model=TINY,
            recipe=dataclasses.replace(RECIPE, epochs=20),
            upper=lambda model, x, y, seed: Radius(0.4, 2)(model, x, y, seed=seed) * float("nan"),
        )  # fmt: skip


CRAFT = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads({threads})
import test_pacd
test_pacd.craft_eight(test_pacd.load_digits(), {folder!r}, "killed")
"""


def craft_eight(data: Dataset, folder: str | Path, name: str, resume: bool = False) -> Poison:
    files = {"checkpoint": Path(folder) / f"{name}.partial", "metrics": Path(folder) / f"{name}.metrics"}
    recipe = dataclasses.replace(RECIPE, epochs=8)
    return craft(
        data, Gaussian(0.4), target_class=2, epsilon=0.1, model=TINY, seed=4, recipe=recipe, resume=resume, **files
    )


def test_resuming_after_a_kill_gives_the_same_poison(digits, tmp_path):
    whole = craft_eight(digits, tmp_path, "whole")
    code = CRAFT.format(tests=str(Path(__file__).parent), threads=torch.get_num_threads(), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (tmp_path / "killed.partial").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (tmp_path / "killed.partial").exists()
    killed = craft_eight(digits, tmp_path, "killed", resume=True)
    assert torch.equal(whole.images, killed.images)
    lines = [(tmp_path / f"{name}.metrics").read_text().splitlines() for name in ("whole", "killed")]
    strip = [[{**json.loads(line), "seconds": 0} for line in each] for each in lines]
    assert strip[0] == strip[1]


def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    given = {"target_class": 2, "model": TINY, "recipe": recipe, "checkpoint": tmp_path / "c", "resume": True}
    craft(digits, Gaussian(0.4), epsilon=0.1, **given)
    with pytest.raises(ValueError, match="another run: epsilon is 0.1 there and 0.2 here"):
        craft(digits, Gaussian(0.4), epsilon=0.2, **given)
    one_less = dataclasses.replace(digits, x_val=digits.x_val[:-1], y_val=digits.y_val[:-1])
    with pytest.raises(ValueError, match="another run: validation"):
        craft(one_less, Gaussian(0.4), epsilon=0.1, **given)
    (tmp_path / "c").write_text("nonsense")
    with pytest.raises(ValueError, match="not a crafting checkpoint"):
        craft(digits, Gaussian(0.4), epsilon=0.1, **given)


NORMED = []


def normed(num_classes: int) -> nn.Module:
    """Batch norm and dropout: what differs between training and certification."""
    parts = [nn.Conv2d(1, 4, 5, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
    NORMED.append(nn.Sequential(*parts, nn.Linear(100, num_classes)))
    return NORMED[-1]


def test_the_upper_loss_sees_the_network_as_it_is_certified(digits):
    """Statistics of training, not of validation images of one class; and no evaluation but lower steps moves them."""
    seen = []

    def upper(model, x, y, *, seed):
        seen.append((NORMED[-1].training, int(NORMED[-1][1].num_batches_tracked)))
        return model(x).sum()

    recipe = dataclasses.replace(RECIPE, epochs=1, restart=1, lower_steps=2)
    given = {"target_class": 2, "epsilon": 0.1, "upper": upper, "model": f"{__name__}:normed", "recipe": recipe}
    first = craft(digits, Gaussian(0.4), **given)
    assert seen == [(False, 2 * (step + 1)) for step in range(len(seen))] and len(seen) >= 2
    assert torch.equal(first.images, craft(digits, Gaussian(0.4), **given).images)  # the seed decides dropout too
