"""Work of which every process does a part: training's batches, MetaPoison's surrogates, PACD's two losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_metapoison import NORMED, TINY, attack, small
from torch import Tensor, nn
from torchrun_agent import GLOO, Agent, trains

from pacd_fast.data import Dataset
from pacd_fast.poisoning import Ball, MetaPoison, Pacd, Poison, Radius, Recipe, metapoison, metapoison_crafting, pacd
from pacd_fast.ranks import Ranks
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, fit, splitting

pytestmark = [pytest.mark.skipif(not GLOO, reason="this torch has no gloo"), trains]


class Exact(nn.Module):
    """Two convolutions with batch norm in float64: sums of any order agree to 1e-13, and no choice hangs on them."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4, momentum=None), nn.Tanh(), nn.Flatten(), nn.Linear(16, classes),
        ).double()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double())


EXACT = f"{__name__}:Exact"


def ranks_do(folder: Path, size: int, function: Callable[[int], object]) -> list[object]:
    """What each of so many processes with a process group returned."""

    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        torch.save(function(rank), folder / f"{rank}.pt")
        dist.destroy_process_group()
        return 0

    agent = Agent(folder, size)
    agent.start(work)
    assert agent.ended() == [0] * size, agent.said()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def group() -> object:
    return dist.group.WORLD


TRAININGS = {
    "standard": (Standard(), {"augment": True}),
    "gaussian": (Gaussian(0.3, 2), {"microbatch": 7, "optimizer": "momentum"}),
    "smoothadv": (SmoothAdv(0.3, 0.5, k=1), {"weight_decay": 0.01}),
}


def trained(name: str, **options: object) -> dict[str, Tensor]:
    """22 images in batches of 10: the last has 2, fewer than three processes."""
    loss, settings = TRAININGS[name]
    data = small()
    torch.manual_seed(3)
    network = Exact()
    fit(
        network, (data.x_train[:22], data.y_train[:22]), loss, epochs=3, batch_size=10, lr=0.01, seed=5,
        **settings, **options,
    )  # fmt: skip
    return dict(network.state_dict())


def test_training_by_three_is_that_of_one(tmp_path):
    """Sums of 22 * 2 * 36 float64 terms err by 4e-13 of their size at most, over 9 steps of rates that sum to 0.1."""

    def function(rank: int) -> object:
        return {name: trained(name, group=group(), metrics=tmp_path / f"{name}-3.jsonl") for name in TRAININGS}

    alone = {name: trained(name, metrics=tmp_path / f"{name}-1.jsonl") for name in TRAININGS}
    ranks = ranks_do(tmp_path, 3, function)
    for name, expected in alone.items():
        for key, value in expected.items():
            assert all(torch.equal(found[name][key], ranks[0][name][key]) for found in ranks), (name, key)
            torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-9, atol=1e-10, msg=f"{name} {key}")
        files = [(tmp_path / f"{name}-{size}.jsonl").read_text().splitlines() for size in (3, 1)]
        lines = [[json.loads(line) for line in file] for file in files]
        for found, alone in zip(*lines, strict=True):
            assert found["accuracy"] == alone["accuracy"]
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)  # kept in float32
        torch.manual_seed(3)
        assert not torch.allclose(expected["layers.0.weight"], Exact().layers[0].weight, rtol=0.01)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_ranks_is_that_of_all_rows(affine, tmp_path):
    """By torch's kernels as in steps, and as torch's own batch norm of all rows has it, twice differentiated too.

    The rows of the last of three ranks do not count.
    """
    draw = torch.Generator().manual_seed(0)
    x, slopes = (torch.randn(12, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    given = [3 * x + 2, *torch.rand(2, 5, generator=draw, dtype=torch.float64).add(0.5).unbind()]
    kinds, eps = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}, 1e-3

    def slopes_of(y: Tensor, at: list[Tensor], weights: Tensor, **graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * weights).sum(), at, materialize_grads=True, **graph)

    def function(rank: int) -> object:
        ranks, found = Ranks.of_group(group()), {}
        rows, counts = slice(4 * rank, 4 * rank + 4), float(rank < 2)
        for way in (splitting._Norm.apply, splitting._in_steps):
            for dtype in kinds:
                wide = torch.promote_types(dtype, torch.float32)
                at = [given[0][rows].to(dtype), *(each.to(wide) for each in given[1:] if affine)]
                at = [each.clone().requires_grad_() for each in at]
                y, *statistics = way(*(at if affine else [*at, None, None]), eps, counts, ranks)
                first = slopes_of(y, at, counts * slopes[rows].to(dtype), retain_graph=True)
                again = slopes_of(y, at, counts * slopes[rows].to(dtype), create_graph=True)
                second = slopes_of(again[0], at, counts * slopes[rows].to(dtype).square())
                found[getattr(way, "__name__", "apply"), dtype] = [
                    [each.detach().double() for each in each_of] for each_of in ([y, *statistics], first, again, second)
                ]
        return found

    ranks = ranks_do(tmp_path, 3, function)
    at = [each.clone().requires_grad_() for each in (given[0][:8], *given[1:])]
    y = F.batch_norm(at[0], None, None, *(at[1:] if affine else [None, None]), True, 0.0, eps)
    at = at if affine else at[:1]
    first = slopes_of(y, at, slopes[:8], create_graph=True)
    second = slopes_of(first[0], at, slopes[:8].square())
    for (way, dtype), found in ranks[0].items():
        others = [rank[way, dtype] for rank in ranks]
        same = {"rtol": kinds[dtype], "atol": 20 * kinds[dtype], "msg": lambda text, at=(way, dtype): f"{at}: {text}"}
        torch.testing.assert_close(torch.cat([others[0][0][0], others[1][0][0]]), y.detach(), **same)
        torch.testing.assert_close(found[0][1], given[0][:8].mean((0, 2)), **same)
        torch.testing.assert_close(found[0][2], given[0][:8].var((0, 2), correction=0), **same)
        assert float(found[0][3]) == 8 * 7
        for part, expected in ((1, first), (2, first), (3, second)):
            to_x = torch.cat([rank[part][0] for rank in others[:2]])
            torch.testing.assert_close(to_x, expected[0].detach(), **same)
            for place in range(1, len(at)):
                total = sum(rank[part][place] for rank in others)
                torch.testing.assert_close(total, expected[place].detach(), **same)
        assert not others[2][1][0].any(), "rows that do not count"


@pytest.mark.parametrize("loss", [Standard(), Gaussian(0.3, 2), Macer(0.3, k=4), SmoothAdv(0.3, 0.5, k=2)], ids=str)
def test_a_loss_is_the_mean_of_its_images_each_with_its_noise(loss):
    """In float32: every image's gradient errs by some units of its size, wherever it is computed."""
    data = small()
    x, y = data.x_train[:9] / 255, data.y_train[:9]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))

    def gradient(**rows: object) -> Tensor:
        chosen = rows.get("image_ids", torch.arange(9))
        value = loss(network, x[chosen], y[chosen], seed=11, **rows)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))]).double()

    whole, each = gradient(), torch.stack([gradient(image_ids=torch.tensor([i])) for i in range(9)])
    assert ((whole - each.mean(0)).abs() <= 64 * 2**-24 * each.abs().amax()).all()
    assert not torch.allclose(gradient(image_ids=torch.tensor([0])), each[1], rtol=0.01)


def test_training_goes_on_and_refuses(tmp_path):
    data = small()

    def network() -> nn.Module:
        torch.manual_seed(3)
        return Exact()

    def function(rank: int) -> object:
        there = {"checkpoint": tmp_path / "c", "resume": True}
        first, second = (trained_for(epochs, group=group(), **there) for epochs in (1, 3))
        dropout = nn.Sequential(nn.Dropout(0.5), network())
        dropout, other = nn.Sequential(nn.Dropout(0.5), network()), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        said = [
            refusal(dropout, Standard()), refusal(network(), Standard(), seed=rank),
            refusal(network(), lambda model, x, y, seed: 0.0), refusal(other if rank else network(), Standard()),
        ]  # fmt: skip
        nan = network()
        with torch.no_grad():
            nan.layers[0].weight[0] = torch.nan
        return first, second, [*said, refusal(nan, Standard())]

    def refusal(model: nn.Module, loss: object, **options: object) -> str:
        with pytest.raises(ValueError) as caught:
            fit(model, (data.x_train, data.y_train), loss, epochs=1, group=group(), **options)
        return str(caught.value)

    def trained_for(epochs: int, **options: object) -> Tensor:
        model = fit(network(), (data.x_train, data.y_train), Gaussian(0.3), epochs=epochs, lr=0.01, **options)
        return model.layers[0].weight.detach()

    alone = trained_for(1), trained_for(3)
    for first, second, said in ranks_do(tmp_path, 2, function):
        torch.testing.assert_close((first, second), alone, rtol=1e-9, atol=1e-10)
        assert "dropout is drawn for a whole batch" in said[0] and "seed is 1 at rank 1 and 0 at rank 0" in said[1]
        assert "must take image_ids" in said[2] and "model is Sequential@" in said[3]
        assert "the loss is nan at epoch 0, step 0" in said[4]


@pytest.mark.parametrize(("before", "after", "model"), [(3, 2, TINY), (2, 3, NORMED)], ids=["tiny", "norm"])
@pytest.mark.usefixtures("one_thread")
def test_surrogates_shared_by_processes_make_the_poison_of_one(before, after, model, tmp_path):
    """And a run that was stopped goes on with others.

    Gradients are added in float64: a bit differs where a sum lies within 1e-15 of a tie in float32, for any of these
    1 536 sums with probability 1e-5.
    """
    data, plan = small(), attack(model=model, surrogates=4, steps=4)
    whole = metapoison(data, plan)
    for poison in attack_in_turns(data, plan, before, after, tmp_path):
        assert torch.equal(poison.images, whole.images)
        assert len(poison.settings["history"]) == 4
        for a, b in zip(poison.settings["history"], whole.settings["history"], strict=True):
            assert {**a, "seconds": 0} == pytest.approx({**b, "seconds": 0}, rel=1e-12)


def attack_in_turns(data: Dataset, plan: MetaPoison, before: int, after: int, folder: Path) -> list:
    """Crafting that all processes of a run leave in the third step, and others end."""

    def stopped(rank: int) -> None:
        step = metapoison_crafting._Crafting.step

        def until(self: metapoison_crafting._Crafting) -> object:
            if len(self.history) == 2:
                raise InterruptedError
            return step(self)

        metapoison_crafting._Crafting.step = until
        with pytest.raises(InterruptedError):
            metapoison(data, plan, checkpoint=folder / "craft", group=group())

    ranks_do(folder, before, stopped)
    return ranks_do(
        folder, after, lambda rank: metapoison(data, plan, checkpoint=folder / "craft", resume=True, group=group())
    )


PLANS = {
    "gaussian": (Gaussian(0.25, 2), {}),
    "smoothadv": (SmoothAdv(0.25, 0.5), {"curvature": "hessian"}),
    "standard": (Standard(), {}),
}


def crafted(name: str, **options: object) -> Poison:
    loss, settings = PLANS[name]
    recipe = Recipe(
        epochs=1, clean_batch=13, poison_batch=10, upper_batch=7, lower_steps=8, lower_lr=0.05, outer_lr=0.02,
        solver_steps=4, **settings,
    )  # fmt: skip
    upper = None if name == "standard" else Radius(0.25, copies=3)
    plan = Pacd(loss, 1, Ball(0.1), upper=upper, model=EXACT, recipe=recipe)
    return pacd(dataclasses.replace(small(), x_val=small().x_test, y_val=small().y_test), plan, **options)


def test_pacd_by_two_is_that_of_one(tmp_path):
    alone = {name: crafted(name) for name in PLANS}
    for found in ranks_do(tmp_path, 2, lambda rank: {name: crafted(name, group=group()) for name in PLANS}):
        for name, poison in alone.items():
            assert poison.distortion(small()).max() > 0.01
            far = (poison.images.int() - found[name].images.int()).abs()
            assert far.max() <= 1 and far.count_nonzero() <= 2, name  # a step of Adam is 5 levels; ties of rounding
