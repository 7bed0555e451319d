"""What PACD's bilevel problem is made of: which images each level sees, what is drawn anew, when it starts afresh."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pacd_fast.data import Dataset
from pacd_fast.poisoning import Ball, Pacd, Recipe, pacd, pacd_crafting
from pacd_fast.training import Gaussian

RECIPE = Recipe(
    epochs=4, clean_batch=30, poison_batch=8, upper_batch=6, lower_steps=2, outer_lr=0.02, restart=2, solver_steps=3
)
NETWORKS: list[nn.Module] = []


def tiny(num_classes: int) -> nn.Module:
    NETWORKS.append(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, num_classes)))
    return NETWORKS[-1]


def small() -> Dataset:
    """Three classes of float images, no two alike: 72 to train, 30 for validation."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = 0.3 + 0.2 * labels.view(-1, 1, 1, 1) / 2 + 0.2 * torch.rand(120, 1, 4, 4, generator=generator)
    parts = (slice(0, 72), slice(72, 90), slice(90, 120))
    (x, y), (xt, yt), (xv, yv) = ((images[part], labels[part]) for part in parts)
    return Dataset("small", x, y, xt, yt, xv, yv, tuple("abc"))


@dataclasses.dataclass(frozen=True)
class Watched(Gaussian):
    """Gaussian augmentation that notes images and seeds of the lower steps."""

    seen: list[tuple[Tensor, int]] = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, model, x, y, *, seed):
        self.seen.append((x.detach().clone(), seed))
        return super().__call__(model, x, y, seed=seed)


def craft(recipe: Recipe = RECIPE, epsilon: float = 0.1, **options):
    loss = Watched(0.3)
    poison = pacd(small(), Pacd(loss, 1, Ball(epsilon), model=f"{__name__}:tiny", recipe=recipe, **options))
    return poison, loss.seen


def test_upper_images_are_of_the_target_class_and_no_others():
    labels = []

    def upper(model, x, y, *, seed):
        labels.append(y)
        return model(x).sum()

    craft(upper=upper)
    assert labels and all(len(y) == 6 and bool((y == 1).all()) for y in labels)


def test_the_originals_of_poisoned_images_take_no_part_in_crafting():
    """A victim trains on the poison in their place."""
    data, (poison, seen) = small(), craft(fraction=0.75)
    originals = data.x_train[poison.index].flatten(1)
    assert 0 < len(poison.index) < int((data.y_train == 1).sum())
    for x, _ in seen:
        clean = x[: RECIPE.clean_batch].flatten(1)
        assert len(x) == RECIPE.clean_batch + RECIPE.poison_batch
        assert not bool((clean[:, None] == originals).all(2).any())


def test_every_lower_step_of_crafting_draws_its_own_noise():
    _, seen = craft()
    assert len(seen) == 4 * 3 * 2 and len({seed for _, seed in seen}) == len(seen)


def test_crafting_restarts_weights_and_the_linear_system(monkeypatch):
    """q goes from one outer step to the next, and a restart forgets it together with the weights it was for."""
    real, starts = pacd_crafting.hypergradient, []

    def watched(upper, lower, outer, inner, **options):
        found = real(upper, lower, outer, inner, **options)
        starts.append((id(inner), options["warm_start"], found[1].q))
        return found

    monkeypatch.setattr(pacd_crafting, "hypergradient", watched)
    NETWORKS.clear()
    craft()
    assert len(NETWORKS) == 2 and len(starts) == 12  # four epochs of three steps, restarted after two
    assert [name for name, *_ in starts] == [id(NETWORKS[0])] * 6 + [id(NETWORKS[1])] * 6
    first = [network[1].weight for network in NETWORKS]
    assert not torch.equal(first[0], first[1])
    for step, (_, warm, _) in enumerate(starts):
        assert warm is None if step % 6 == 0 else torch.equal(warm, starts[step - 1][2])


def test_the_first_step_on_every_image_has_the_crafting_rate():
    """Adam's moments, and their bias correction, are each image's own, whenever it is visited first."""
    data = small()
    recipe = dataclasses.replace(RECIPE, epochs=1)
    poison, _ = craft(recipe, upper=lambda model, x, y, *, seed: 100 * model(x)[:, 1].mean())
    moved = (poison.images - data.x_train[poison.index]).flatten(1).abs().amax(1)
    assert len(moved) == 24
    torch.testing.assert_close(moved, torch.full((24,), 0.02), rtol=1e-3, atol=0)


PASSES: list[tuple[bool, torch.dtype]] = []


class Noting(nn.Module):
    """Notes every pass: whether it was in training mode, and what its multiplications gave."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        PASSES.append((self.training, logits.dtype))
        return logits


def test_bfloat16_is_of_lower_steps_and_products_alone(monkeypatch):
    """The radius that falls, the system's right side and what the poison is moved by keep 32 bits."""
    marks = []

    class Marked(Gaussian):
        def __call__(self, model, x, y, *, seed):
            marks.append(len(PASSES))
            return super().__call__(model, x, y, seed=seed)

    real, systems = pacd_crafting.hypergradient, []

    def watched(*arguments, **options):
        found = real(*arguments, **options)
        systems.append((found[0].dtype, found[1].q.dtype, found[1].products))
        return found

    def logit(model, x, y, *, seed):
        return model(x)[:, 1].mean()

    monkeypatch.setattr(pacd_crafting, "hypergradient", watched)
    images, low = {}, torch.bfloat16
    for dtype in ("float32", "bfloat16"):
        PASSES.clear()
        marks.clear()
        systems.clear()
        recipe = dataclasses.replace(RECIPE, dtype=dtype, tolerance=0.0)
        attack = Pacd(Marked(0.3), 1, Ball(0.1), logit, model=f"{__name__}:Noting", recipe=recipe)
        images[dtype] = pacd(small(), attack).images
        lower = [PASSES[mark] for mark in marks]
        outer = [found for i, found in enumerate(PASSES) if i not in marks]
        assert len(systems) == 12 and {each[:2] for each in systems} == {(torch.float32, torch.float32)}
        assert lower == [(True, getattr(torch, dtype))] * 24 and (False, low) not in outer
        if dtype == "float32":
            assert (True, low) not in outer
        else:  # of a system: its linearisation and products; in full precision those of residual and mixed derivative
            assert outer.count((True, low)) == sum(products for *_, products in systems) >= 4 * len(systems)
            assert outer.count((True, torch.float32)) == 3 * len(systems)
    assert not torch.equal(images["float32"], images["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_poison_lowers_the_upper_loss_and_its_mirror_image_raises_it(sign, dtype):
    """Against the network that a victim becomes, with an upper loss that is linear in its logits."""

    def upper(model, x, y, *, seed):
        return sign * model(x)[:, 1].mean()

    values = []
    recipe = dataclasses.replace(RECIPE, epochs=8, restart=8, lower_steps=6, lower_lr=0.02, dtype=dtype)

    def watched(model, x, y, *, seed):
        value = upper(model, x, y, seed=seed)
        values.append(sign * float(value.detach()))
        return value

    craft(recipe, 0.5, upper=watched)
    down = sum(values[-3:])
    values.clear()
    craft(dataclasses.replace(recipe, outer_lr=1e-9), 0.5, upper=watched)
    assert sign * (down - sum(values[-3:])) < -0.05
