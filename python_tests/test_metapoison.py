"""MetaPoison: its schedule, gradients, constraints, resuming; judging its victims; bad input; an attack that works."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from pacd_fast import attack_commands, datasets, metapoison_commands, plots, targeted
from pacd_fast import metapoison as module
from pacd_fast.__main__ import main
from pacd_fast.datasets import Dataset, as_float
from pacd_fast.metapoison import MetaPoison, adversarial_loss, margin, metapoison
from pacd_fast.poison import Ball, Poison


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
    order = torch.randperm(60, generator=torch.Generator().manual_seed(module.mix(0, module._ORDER, 1, 0, 0)))
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


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    path = tmp_path / "craft.partial"
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(path, weights_only=True)
    done = len(state["history"])
    assert 6 <= done < 400
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:  # the same 400-step plan on both sides, both stopped a little later
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
    finally:
        torch.set_num_threads(threads)
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


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    attack_commands.add_poison(parser)
    return parser.parse_args(["--attack", "metapoison", "--out", "unused.npz", *given])


def test_the_command_line(tmp_path, capsys):
    data = small()
    given = ["--target-index", "1", "2", "--target-class", "c", "--poison-class", "b", "--epsilon", "16/255"]
    given += ["--adversarial-class", "0", "--surrogates", "2", "--craft-steps", "2", "--epochs", "2", "--lr", "0.01"]
    given += ["--model", TINY, "--out", str(tmp_path / "poison.npz"), "--optimizer", "sgd"]
    made = metapoison_commands.attack_of(options(*given), data)
    assert made.target_index == (5, 8) and (made.poison_class, made.adversarial_class) == (1, 0)
    assert made.ball.epsilon == 16 / 255 and made.momentum == 0.0
    poison = metapoison_commands.run(options(*given), data)
    assert torch.equal(Poison.load(tmp_path / "poison.npz").images, poison.images)
    assert sorted(os.listdir(tmp_path)) == ["poison.npz", "poison.png"]
    assert "6 poisons for test images [5, 8]" in capsys.readouterr().err
    assert metapoison_commands.attack_of(options("--poison-class", "1", "--norm", "l2"), data).ball.norm == "l2"
    default = metapoison_commands.attack_of(options("--poison-class", "1"), data)
    assert (default.surrogates, default.unroll, default.steps, default.batch_size) == (24, 2, 60, 125)
    assert (default.lr, default.adversarial_class, default.ball.epsilon) == (0.1, 1, 16 / 255)
    for bad, message in (
        (["--poison-class", "bird"], "has no class 'bird': it has a, b, c"),
        ([], "metapoison needs a --poison-class"),
        (["--poison-class", "b", "--target-class", "c", "--target-index", "4"], "target_index 4 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            metapoison_commands.attack_of(options(*bad), data)


def test_poison_and_audit_as_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = small()
    arrays = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez("small.npz", **arrays)
    source = ["--data", "small.npz", "--device", "cpu"]
    craft = [
        "--attack",
        "metapoison",
        "--poison-class",
        "1",
        "--target-index",
        "0",
        "--epsilon",
        "16/255",
        "--epochs",
        "2",
    ]
    craft += ["--surrogates", "2", "--craft-steps", "2", "--lr", "0.01", "--model", TINY, "--batch-size", "16"]
    assert main(["poison", *source, *craft, "--out", "p.npz"]) == 0 and Path("p.png").exists()
    poison = Poison.load("p.npz")
    assert float(poison.distortion(datasets.load("small.npz")).max()) <= 16 / 255
    judge = ["audit", *source, "--poison", "p.npz", "--seeds", "2", "--epochs", "3", "--batch-size", "20"]
    capsys.readouterr()
    assert main(judge) == 0
    said = capsys.readouterr().out
    for name in ("clean", "metapoison", "noise", "watermark"):
        assert re.search(rf"^{name} +[0-2]/2 ", said, re.MULTILINE)
    found = json.loads(Path("audit/audit.json").read_text())["p"]
    assert found["clean"]["victims"] == 2 and 0 <= found["metapoison"]["low"] <= found["metapoison"]["high"] <= 1
    lines = Path("audit/p.jsonl").read_text()
    assert len(lines.splitlines()) == 8
    assert main(judge) == 0 and Path("audit/p.jsonl").read_text() == lines  # nobody is trained twice
    assert main([*judge, "--against", "clean", "--optimizer", "sgd", "--lr", "0.2", "--work", "other"]) == 0
    assert len(Path("other/p.jsonl").read_text().splitlines()) == 4
    random = ["poison", *source, "--attack", "random", "--target-class", "1", "--validation", "0", "--out", "r.npz"]
    assert main(random) == 0
    assert main([*judge, "--poison", "p.npz", "r.npz"]) == 2
    assert "audit them one by one" in capsys.readouterr().err.splitlines()[-1]


def digits(per_class: int = 80) -> Dataset:
    """Three digits of MNIST, few of each, and their held-out images."""
    whole = datasets.load("mnist5k")
    few = [(whole.y_train == digit).nonzero().flatten()[:per_class] for digit in (4, 7, 9)]
    train = torch.cat(few).sort().values
    test = torch.isin(whole.y_test, torch.tensor([4, 7, 9])).nonzero().flatten()
    renamed = torch.zeros(10, dtype=torch.int64)
    renamed[[4, 7, 9]] = torch.arange(3)
    x, y, empty = whole.x_train[train], renamed[whole.y_train[train]], whole.x_train[:0]
    names = ("four", "seven", "nine")
    return Dataset("digits", x, y, whole.x_test[test], renamed[whole.y_test[test]], empty, whole.y_train[:0], names)


def dense(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, num_classes))


def test_an_attack_on_digits_beats_noise_on_fresh_victims(tmp_path):
    """A seven becomes a nine through a sixth of the images, all nines.  It and the settings were chosen on other seeds.

    The watermark is no bound here: laid over nines, a seven teaches a dense network even more than this attack.
    """
    data = digits()
    recipe = targeted.Recipe(model=f"{__name__}:dense", epochs=8, batch_size=30, lr=0.05, drops=())
    pilot = targeted.judge(data, range(len(data.x_test)), recipe, count=6, seed=100)
    margins = torch.tensor([victim.judged(2)["margin"] for victim in pilot])
    sevens = (data.y_test == 1) & (margins.amin(0) > 0.3)  # that no pilot takes for a nine; the nearest of them
    target = int(torch.where(sevens, margins.mean(0), torch.inf).argmin())
    plan = MetaPoison(
        poison_class=2, adversarial_class=2, target_index=(target,), budget=1 / 6, ball=Ball(0.1), model=recipe.model,
        surrogates=8, unroll=1, steps=16, epochs=8, batch_size=30, lr=0.05, drops=(), seed=3,
    )  # fmt: skip
    poison = metapoison(data, plan)
    out = tmp_path / "victims.jsonl"
    found = targeted.audit(poison, data, targeted.Recipe.of(poison), count=8, out=out)
    print(targeted.table(found))
    assert found["clean"]["successes"] <= 1 and found["noise"]["successes"] <= 1
    assert found["metapoison"]["successes"] >= 4
    assert found["metapoison"]["margin"] < found["noise"]["margin"] - 0.8
    assert found["metapoison"]["accuracy"] > found["clean"]["accuracy"] - 0.03
    lines = out.read_text().splitlines()
    assert len(lines) == 32
    # Victims whose line is there are not trained again; a torn one is.
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    started = time.perf_counter()
    again = targeted.audit(poison, data, targeted.Recipe.of(poison), count=8, out=out)
    assert again == found and len(out.read_text().splitlines()) == 32
    assert time.perf_counter() - started < 5


def test_judging(tmp_path):
    data = small()
    recipe = targeted.Recipe(model=TINY, epochs=3, batch_size=16, lr=0.05)
    found = targeted.judge(data, [0, 2], recipe, count=2, seed=7, curve=True, out=tmp_path / "a.jsonl")
    assert [victim.seed for victim in found] == [7, 8] and found[0].logits != found[1].logits
    curve, last = found[0].progress(1), found[0].judged(1)
    assert {len(values) for values in curve.values()} == {3}
    assert curve["margin"][-1] == pytest.approx(sum(last["margin"]) / 2) and curve["accuracy"][-1] == found[0].accuracy
    one = found[0].of(1)
    assert one.judged(1) == {name: values[1:] for name, values in last.items()}
    assert one.progress(1)["loss"][-1] == pytest.approx(last["loss"][1])
    assert targeted.judge(data, [0, 2], recipe, count=2, seed=7, out=tmp_path / "a.jsonl") == found
    one = targeted.summary([targeted.Victim(0, [[0.0, 1.0], [2.0, 0.0]], 0.5)] * 4, 1)
    assert one["margin"] == 0.5 and one["target loss"] == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.e**2)) / 2
    )
    assert (one["successes"], one["trials"], one["success"]) == (4, 8, 0.5)
    assert one["low"] == pytest.approx(0.157, abs=1e-3) and one["high"] == pytest.approx(0.843, abs=1e-3)
    assert "4/8" in targeted.table({"clean": one}) and "16% to 84%" in targeted.table({"clean": one})
    poison = metapoison(data, attack(steps=1))
    mark, noise = targeted.watermark(poison, data), targeted.noise(poison, data, seed=1)
    for other in (mark, noise):
        assert torch.equal(other.index, poison.index) and float(other.distortion(data).max()) <= poison.ball.epsilon
    base, target = as_float(data.x_train[poison.index]), as_float(data.x_test[:1])
    expected = base + (0.1 * (target - base)).clamp(-16 / 255, 16 / 255)
    assert float((as_float(mark.images) - expected).abs().max()) <= 0.5 / 255 + 1e-6
    assert targeted.Recipe.of(poison, lr=0.2).lr == 0.2 and targeted.Recipe.of(poison).model == TINY
    assert targeted.Recipe.of(metapoison(data, attack(steps=1, momentum=0.0))).optimizer == "sgd"
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a line about a victim"):
        targeted.judge(data, [0], recipe, out=tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="at least one victim"):
        targeted.judge(data, [0], recipe, count=0)
    with pytest.raises(ValueError, match="unknown comparison 'smoke'"):
        targeted.audit(poison, data, recipe, against=["smoke"])
    with pytest.raises(ValueError, match="names no target images"):
        targeted.audit(dataclasses.replace(poison, settings={}), data, recipe)
    with pytest.raises(ValueError, match="unknown optimizer 'lbfgs'"):
        targeted.judge(data, [0], dataclasses.replace(recipe, optimizer="lbfgs"))
