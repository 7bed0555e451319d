"""MetaPoison: its schedule, gradients, constraints, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from pacd_fast.data import Dataset, as_float
from pacd_fast.experiments import plots
from pacd_fast.poisoning import Ball, MetaPoison, Poison, adversarial_loss, margin, metapoison
from pacd_fast.poisoning import metapoison_crafting as module
from pacd_fast.randomness import Purpose, mix


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))


def normed(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, num_classes)]
    return nn.Sequential(*layers)


TINY, NORMED = f"{__name__}:tiny", f"{__name__}:normed"


def small() -> Dataset:
    """Three classes of 8 x 8 images in uint8: 60 to train, 12 to test."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(72) % 3
    centres = torch.randint(60, 196, (3, 1, 8, 8), generator=generator)
    images = (centres[labels] + torch.randint(-60, 60, (72, 1, 8, 8), generator=generator)).to(torch.uint8)
    return Dataset("small", images[:60], labels[:60], images[60:], labels[60:], images[:0], labels[:0], tuple("abc"))


def attack(**changes) -> MetaPoison:
    settings = {
        "poison_class": 1, "adversarial_class": 1, "target_index": (0,), "budget": 0.1, "model": TINY, "surrogates": 3,
        "steps": 4, "epochs": 5, "batch_size": 16, "lr": 0.05, "unroll": 2, "craft_lr": 0.5,
    }  # fmt: skip
    return MetaPoison(**settings | changes)


def test_objectives():
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, 0.0, -1.0]], requires_grad=True)
    torch.testing.assert_close(margin(logits, 1), torch.tensor([-1.5, 3.0]))
    labels = torch.tensor([1, 1])
    torch.testing.assert_close(adversarial_loss(logits, 1, "cross-entropy"), F.cross_entropy(logits, labels))
    torch.testing.assert_close(adversarial_loss(logits, 1, "carlini-wagner"), torch.tensor(1.5))  # (0 + 3) / 2
    torch.testing.assert_close(adversarial_loss(logits, 1, "carlini-wagner", 1.0), torch.tensor(1.0))
    (slope,) = torch.autograd.grad(adversarial_loss(logits, 1, "carlini-wagner"), logits)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 0.0]]))


def test_surrogates_are_staggered_and_start_again():
    data, plan = small(), attack(surrogates=3, epochs=5, steps=7)
    assert [plan.start(m) for m in range(3)] == [0, 1, 3]
    assert [MetaPoison(0, 0, surrogates=24, epochs=100).start(m) for m in (0, 1, 12, 23)] == [0, 4, 50, 95]
    index, _ = plan.chosen(data)
    crafting = module._Crafting(data, plan, index, torch.device("cpu"))
    for m in range(3):
        surrogate = crafting.fresh(m)
        for _ in range(plan.start(m)):
            crafting.epoch(surrogate, None)
        crafting.surrogates.append(surrogate)
    first = [s.model[1].weight.detach().clone() for s in map(crafting.fresh, range(3))]
    assert not torch.equal(first[0], first[1])
    seen = []
    for _ in range(7):
        crafting.step()
        seen.append([(s.generation, s.epoch) for s in crafting.surrogates])
    for m, start in enumerate((0, 1, 3)):  # epochs passed since the beginning, in rounds of five
        assert [s[m] for s in seen] == [((start + k) // 5, (start + k) % 5 + 1) for k in range(7)]
    again = crafting.fresh(2, 1).model[1].weight
    assert not torch.equal(again, first[2]) and torch.equal(again, crafting.fresh(2, 1).model[1].weight)


def test_rates():
    plan = attack(epochs=10, lr=0.5, steps=10, craft_lr=0.5, ball=Ball(0.1), drops=(0.4, 0.6, 0.8))
    assert [round(plan.rate(e), 6) for e in (0, 3, 4, 5, 6, 8, 9)] == [0.5, 0.5, 0.05, 0.05, 0.005, 0.0005, 0.0005]
    assert [round(plan.craft_rate(s), 6) for s in (0, 5, 6, 7, 8, 9)] == [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]


@pytest.mark.parametrize("model", [TINY, NORMED])
def test_the_meta_gradient_is_that_of_the_written_out_epoch(model):
    """One epoch by hand: look ahead with the poison in, differentiate, advance on the clean batch."""
    data, plan = small(), attack(model=model, lr=0.05, objective="cross-entropy")
    index, _ = plan.chosen(data)
    crafting = module._Crafting(data, plan, index, torch.device("cpu"))
    surrogate, twin = crafting.fresh(1), crafting.fresh(1)
    gradient, numbers = crafting.epoch(surrogate, crafting.u.detach())

    u = crafting.u.detach().clone().requires_grad_()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(mix(0, Purpose.SURROGATE_ORDER, 1, 0, 0)))
    network, total, losses = twin.model, torch.zeros_like(u), []
    target = as_float(data.x_test[:1])
    for batch in order.split(16):
        x, y = as_float(data.x_train[batch]), data.y_train[batch]
        rows = [(i, index.tolist().index(j)) for i, j in enumerate(batch.tolist()) if j in index.tolist()]
        if rows:
            poisoned = torch.stack([u[dict(rows)[i]] if i in dict(rows) else x[i] for i in range(len(x))])
            weights = dict(network.named_parameters())
            for _ in range(2):
                buffers = {name: b.clone() for name, b in network.named_buffers()}
                logits = torch.func.functional_call(network.train(), (weights, buffers), (poisoned,))
                slopes = torch.autograd.grad(F.cross_entropy(logits, y), list(weights.values()), create_graph=True)
                pairs = zip(weights.items(), slopes, strict=True)
                weights = {name: w - 0.05 * slope for (name, w), slope in pairs}
            network.eval()
            logits = torch.func.functional_call(network, weights, (target,))
            loss = F.cross_entropy(logits, torch.tensor([1]))
            losses.append(float(loss.detach()))
            total += torch.autograd.grad(loss, u)[0]
        network.train()
        twin.optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        for group in twin.optimizer.param_groups:
            group["lr"] = 0.05
        twin.optimizer.step()
    again = module._Crafting(data, dataclasses.replace(plan, recompute=True), index, torch.device("cpu"))
    torch.testing.assert_close(again.epoch(again.fresh(1), again.u.detach())[0], gradient, rtol=1e-4, atol=1e-8)
    assert float(total.abs().max()) > 0
    torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))
    assert numbers[1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for name, tensor in network.state_dict().items():  # weights and running statistics advanced on clean batches alone
        torch.testing.assert_close(surrogate.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["cross-entropy", "carlini-wagner"])
def test_poison_keeps_its_constraints_and_says_what_it_is(objective, monkeypatch, tmp_path):
    data, plan = small(), attack(objective=objective, confidence=5.0, target_index=(0, 2), budget=0.2, craft_lr=5.0)
    steps = []
    poison = metapoison(data, plan, after_step=lambda step, now: steps.append((step, now.distortion(data).max())))
    assert [step for step, _ in steps] == [0, 1, 2, 3] and all(float(far) <= 16 / 255 for _, far in steps)
    assert poison.index.tolist() == [3 * i + 1 for i in range(12)] and poison.images.dtype == torch.uint8
    assert int((poison.distortion(data) > 15 / 255).sum()) == 12  # a large rate drives all of them to the border
    kept = poison.settings
    assert kept["target_index"] == [0, 2] and kept["target_labels"] == [0, 2] and kept["surrogates"] == 3
    assert [line["step"] for line in kept["history"]] == [0, 1, 2, 3] and kept["history"][0]["lost"] == 0
    assert json.loads(json.dumps(kept)) == kept
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **named: drawn.extend(self.axes))
    plots.poison(poison, data, tmp_path / "poison.png", images=3)
    assert len(drawn) == 4 * 3 and drawn[0].get_ylabel() == "target" and not drawn[2].images
    assert np.array_equal(drawn[1].images[0].get_array(), as_float(data.x_test[2, 0]).numpy())
    changed = (poison.apply(data).x_train != data.x_train).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(poison.index.tolist())


def test_images_are_in_the_ball_at_every_step_and_rates_fall():
    """The images that surrogates look ahead with, before anything is rounded; a rate that leaves the ball at once."""
    data, plan = small(), attack(surrogates=2, epochs=5, steps=10, craft_lr=5.0, drops=(0.4, 0.8))
    index, _ = plan.chosen(data)
    crafting = module._Crafting(data, plan, index, torch.device("cpu"))
    crafting.surrogates = [crafting.fresh(m) for m in range(2)]
    reached = 0.0
    for number in range(10):
        epochs = [surrogate.epoch % 5 for surrogate in crafting.surrogates]
        crafting.step()
        far = float((crafting.u.detach() - crafting.base).abs().max())
        assert far <= 16 / 255 + 1e-6 and 0 <= float(crafting.u.detach().min()) <= float(crafting.u.detach().max()) <= 1
        reached = max(reached, far)
        assert crafting.adam.param_groups[0]["lr"] == plan.craft_rate(number)
        rates = [surrogate.optimizer.param_groups[0]["lr"] for surrogate in crafting.surrogates]
        assert rates == [plan.rate(epoch) for epoch in epochs]
    assert reached > 15 / 255 and plan.craft_rate(9) < plan.craft_rate(0) and plan.rate(4) < plan.rate(0)


def test_a_surrogate_that_diverges_starts_again_and_is_counted(monkeypatch):
    data, plan = small(), attack(steps=2)
    real, calls = module._Crafting.epoch, []

    def broken(self, surrogate, u):
        gradient, numbers = real(self, surrogate, u)
        if u is not None and surrogate.number == 1 and not calls:
            calls.append(surrogate.epoch)
            gradient[0, 0, 0, 0] = float("nan")
        return gradient, numbers

    monkeypatch.setattr(module._Crafting, "epoch", broken)
    poison = metapoison(data, plan)
    calls.clear()
    index, _ = plan.chosen(data)
    crafting = module._Crafting(data, plan, index, torch.device("cpu"))
    crafting.surrogates = [crafting.fresh(m) for m in range(3)]
    crafting.step()
    assert [s.generation for s in crafting.surrogates] == [0, 1, 0] and crafting.surrogates[1].epoch == 0
    assert torch.equal(crafting.surrogates[1].model[1].weight, crafting.fresh(1, 1).model[1].weight)
    assert calls and [line["lost"] for line in poison.settings["history"]] == [1, 0]
    with pytest.raises(ValueError, match="no surrogate has a finite gradient in crafting step 0: give a smaller lr"):
        metapoison(data, attack(lr=1e20))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_metapoison as t
plan = t.attack(steps=400, surrogates=4)
t.metapoison(t.small(), plan, checkpoint=sys.argv[2], resume=True, after_step=lambda k, p: print(k, flush=True))
"""


def test_resuming_gives_the_bits_of_an_uninterrupted_run(tmp_path):
    data, plan, path = small(), attack(model=NORMED, steps=6), tmp_path / "craft.partial"
    whole = metapoison(data, plan)

    class Stop(Exception):
        pass

    def stop(step, poison):
        if step in (1, 3):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            metapoison(data, plan, checkpoint=path, resume=True, after_step=stop)
    resumed = metapoison(data, plan, checkpoint=path, resume=True)
    assert torch.equal(whole.images, resumed.images)
    for a, b in zip(whole.settings["history"], resumed.settings["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with pytest.raises(ValueError, match="is of another run: seed is 0 there and 1 here"):
        metapoison(data, dataclasses.replace(plan, seed=1), checkpoint=path, resume=True)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is not a crafting checkpoint"):
        metapoison(data, plan, checkpoint=path, resume=True)
    with pytest.raises(FileNotFoundError, match="create it first"):
        metapoison(data, plan, checkpoint=tmp_path / "nowhere" / "x")


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    path = tmp_path / "craft.partial"
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 6:  # printed before the checkpoint of step 6 is written, and after that of step 5
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(path, weights_only=True)
    done = len(state["history"])
    assert 6 <= done < 400
    # the same 400-step plan on both sides, both stopped a little later
    ends = []
    for where in (path, None):
        kept: list[Poison] = []

        def stop(step: int, poison: Poison, kept: list[Poison] = kept) -> None:
            if step == done + 3:
                kept.append(poison)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            metapoison(small(), attack(steps=400, surrogates=4), checkpoint=where, resume=True, after_step=stop)
        ends.append(kept[0])
    assert torch.equal(ends[0].images, ends[1].images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_index": (12,)}, "target_index 12 is out of range: there are 12 test images"),
        ({"target_index": (-1,)}, "target_index -1 is out of range"),
        ({"target_index": ()}, "one or more different test images"),
        ({"target_index": (0, 0)}, "one or more different test images"),
        ({"target_index": (1,)}, "target 1 is of the adversarial class b already"),
        ({"target_index": (1,), "adversarial_class": 2}, "target 1 is of the poison class b"),
        (
            {"budget": 0.5},
            "budget 0.5 is 30 of 60 training images, and class b has 20: give a budget from 0.017 to 0.33",
        ),
        ({"budget": 0.01}, "budget 0.01 is 0 of 60"),
        ({"budget": 0.0}, "budget must be in"),
        ({"poison_class": 3}, "poison_class 3 is not among the 3 classes"),
        ({"adversarial_class": -1}, "adversarial_class -1 is not among"),
        ({"objective": "hinge"}, "unknown objective 'hinge'"),
        ({"surrogates": 0}, "surrogates must be at least 1"),
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"drops": (1.5,)}, "drops must be shares"),
        ({"seed": -1}, "seed must be in"),
        ({"model": "resnet21"}, "unknown model 'resnet21'"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        metapoison(small(), attack(**changes))
    assert "\n" not in str(caught.value)
