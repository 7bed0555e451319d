"""Losses against their formulas, with first and second derivatives; soft operators; training, resuming, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pacd_fast import checkpoints, datasets, models, ops, reference, training, victims
from pacd_fast.__main__ import main
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, fit

SHAPE = (1, 4, 4)


class Smooth64(nn.Module):
    """A small network in float64 behind float32 images, smooth, so that second derivatives are there to compare."""

    def __init__(self, classes: int = 4, scale: float = 3.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, classes)
        self.double()
        with torch.no_grad():
            self.second.weight *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.double().flatten(1))))


def small_data(images: int = 64, classes: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.rand(images, *SHAPE)
    return x, torch.arange(images) % classes


def small_network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, classes))


def noise_of(x: Tensor, sigma: float, k: int, seed: int) -> Tensor:
    """What is added to every copy, [B, k, ...], exactly, in float64."""
    noisy = ops.noisy_copies(x, sigma, k, seed, stream=training.STREAM).double()
    return noisy.view(len(x), k, *x.shape[1:]) - x.double().unsqueeze(1)


def plain(loss, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Every loss written out."""
    if isinstance(loss, Standard):
        return nn.functional.cross_entropy(model(x), y)
    noise = noise_of(x.detach(), loss.sigma, loss.k, seed)
    if isinstance(loss, SmoothAdv):
        x = x + reference.pgd(model, x.detach().double(), y, noise, loss.epsilon, loss.steps)
        noise = noise_of(x.detach().float(), loss.sigma, loss.k, seed)
    copies = (x.double().unsqueeze(1) + noise).flatten(0, 1)
    if isinstance(loss, Macer):
        logits = model(copies).view(len(x), loss.k, -1)
        numbers = {name: getattr(loss, name) for name in ("sigma", "beta", "gamma", "lam")}
        return reference.macer(logits, y, **numbers)
    return nn.functional.cross_entropy(model(copies), y.repeat_interleave(loss.k))


def derivatives(value: Tensor, weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with respect to weights and x, and those of <gradient, fixed direction>: the Hessian's rows there."""
    first = list(torch.autograd.grad(value, [*weights, x], create_graph=True))
    directions = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape) for g in first]
    along = sum((g * d).sum().double() for g, d in zip(first, directions, strict=True))
    return first, list(torch.autograd.grad(along, [*weights, x]))


LOSSES = [
    Standard(),
    Gaussian(0.5),
    Gaussian(0.25, 3),
    Macer(0.5, k=4, beta=2.0, lam=3.0),
    Macer(0.25, k=16, gamma=2.0),
    SmoothAdv(0.25, 0.5, k=1),
    SmoothAdv(0.5, 1.0, steps=4, k=3),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_loss_is_its_formula_with_two_derivatives(loss):
    model, (x, y) = Smooth64(), small_data(12)
    x = (0.4 * x + 0.3).requires_grad_()
    if isinstance(loss, Macer):  # all kinds: wrong, right and inside the hinge, right and beyond it
        logits = model(ops.noisy_copies(x, loss.sigma, loss.k, 5, stream=training.STREAM)).view(12, loss.k, -1)
        y[:8] = ops.soft_smooth(logits, loss.beta).argmax(1)[:8]
        radius = ops.soft_radius(logits, y, beta=loss.beta, sigma=loss.sigma, squeeze=0.0)
        inside = (radius > 0) & (radius <= loss.gamma * loss.sigma / 2)
        assert bool(inside.any()) and bool((radius == 0).any())
    weights = list(model.parameters())
    ours, theirs = loss(model, x, y, seed=5), plain(loss, model, x, y, seed=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # x in float32, all else in float64
    for mine, other in zip(derivatives(ours, weights, x), derivatives(theirs, weights, x), strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
            assert bool((b != 0).any())


def test_macers_second_derivatives_are_finite_where_the_network_is_certain():
    """Beyond the hinge the radius is infinite in float32, its slopes overflow, and the loss must not see them."""
    for scale in (1.0, 3.0, 10.0, 30.0, 100.0):
        logits = (scale * torch.eye(4)).repeat_interleave(2, 0).requires_grad_()
        loss = Macer(0.5, k=2, lam=1.0)(lambda x, z=logits: z, torch.zeros(4, 1, 4, 4), torch.arange(4), seed=0)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        (bent,) = torch.autograd.grad(slope.square().sum() + slope[0, 0], logits)
        assert bool(torch.isfinite(slope).all()) and bool(torch.isfinite(bent).all())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_loss_depends_on_its_seed_alone(loss):
    model, (x, y) = Smooth64(), small_data(6)
    torch.manual_seed(3)
    first = loss(model, x, y, seed=11)
    torch.manual_seed(4)
    assert torch.equal(first, loss(model, x, y, seed=11))
    assert isinstance(loss, Standard) or not torch.equal(first, loss(model, x, y, seed=12))


def test_smoothadv_stays_in_the_ball_and_leaves_the_mode_alone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
    network[2].eval()  # a part that its owner froze
    x, y = small_data(10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for epsilon in (0.0, 0.3, 2.0):
        delta = SmoothAdv(0.25, epsilon, steps=5, k=2).perturbation(network, x, y, seed=0)
        assert float(delta.flatten(1).norm(dim=1).max()) <= epsilon * (1 + 1e-6)
        assert float((x + delta).min()) >= -1e-6 and float((x + delta).max()) <= 1 + 1e-6 and not delta.requires_grad
    assert network.training and network[0].training and not network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        assert float(SmoothAdv(0.25, 1.0)(network, x, y, seed=0)) > float(Gaussian(0.25)(network, x, y, seed=0))
    schedule = SmoothAdv(0.25, 2.0, warmup=4)
    assert [schedule.at_epoch(e).epsilon for e in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("squeeze", [0.001, 0.0])
def test_soft_operators_have_exact_derivatives(squeeze):
    for shape in ((4, 3, 5), (2, 17, 3)):
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = ops.soft_smooth(logits, 2.0).argmax(1)
        y[0] = (y[0] + 1) % shape[2]
        for function in (
            lambda a: ops.soft_smooth(a, 2.0),
            lambda a, y=y: ops.soft_radius(a, y, beta=2.0, sigma=0.5, squeeze=squeeze),
        ):
            assert torch.autograd.gradcheck(function, logits)
            assert torch.autograd.gradgradcheck(function, logits)


def test_soft_operators_at_the_edges():
    logits = torch.zeros(5, 2, 3)
    logits[1, 0, 2] = torch.nan
    logits[2, :, 0] = 1e4  # saturated: 1 - p underflows
    logits[3, :, 1] = torch.inf
    logits[4] = -1e30
    logits.requires_grad_()
    p = ops.soft_smooth(logits, 16.0)
    assert p[1].isnan().all() and p[3].isnan().all() and torch.equal(p[2], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(p[4], torch.full((3,), 1 / 3).to(p.dtype)) or bool((p[4] - 1 / 3).abs().max() < 1e-7)
    y = torch.zeros(5, dtype=torch.int64)
    radius = ops.soft_radius(logits, y, beta=16.0, sigma=0.5, squeeze=0.0)
    assert radius[0] == 0 and radius[1].isnan() and radius[2] == torch.inf and radius[3].isnan() and radius[4] == 0
    (slope,) = torch.autograd.grad(radius[2], logits)
    assert bool((slope[[0, 2, 4]] == 0).all())
    half = ops.soft_radius(torch.randn(3, 2, 4).bfloat16(), torch.zeros(3, dtype=torch.int64), beta=1.0, sigma=1.0)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    "loss, least",
    [(Standard(), 0.9), (Gaussian(0.25), 0.9), (Macer(0.25, k=2, lam=1.0), 0.85), (SmoothAdv(0.25, 0.25), 0.85)],
    ids=str,
)
def test_training_reaches_an_accuracy(loss, least):
    data = datasets.load("mnist5k")
    torch.manual_seed(0)
    network = models.build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    fit(network, (data.x_train, data.y_train), loss, epochs=2, batch_size=100)
    with torch.no_grad():
        right = network(datasets.as_float(data.x_test)).argmax(1) == data.y_test
    assert float(right.double().mean()) >= least


def test_fit_is_a_function_of_its_seed(tmp_path):
    def weights(**options) -> Tensor:
        network = small_network()
        fit(network, data, Gaussian(0.25, 2), epochs=2, batch_size=20, **options)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    data = small_data()
    first = weights(seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, weights(seed=1)) and not torch.equal(first, weights(seed=2))
    assert not torch.equal(first, weights(seed=1, microbatch=7))  # other noise, and the same gradient in expectation
    assert torch.isfinite(weights(seed=1, dtype=torch.bfloat16)).all()


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("momentum", 0.9)])
def test_sgd_with_rate_drops_is_the_written_out_loop(name, momentum):
    (x, y), seen = small_data(), []
    trained = fit(
        small_network(), (x, y), Standard(), epochs=4, batch_size=40, lr=0.2, weight_decay=0.01, optimizer=name,
        drops=(1, 3), seed=5, after_epoch=lambda epoch, model: seen.append((epoch, model[1].weight.detach().clone())),
    )  # fmt: skip
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum, weight_decay=0.01)
    for epoch, rate in enumerate((0.2, 0.02, 0.02, 0.002)):
        optimizer.param_groups[0]["lr"] = rate
        order = torch.randperm(64, generator=torch.Generator().manual_seed(training.mix(5, epoch)))
        for index in order.split(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        assert seen[epoch][0] == epoch
        torch.testing.assert_close(seen[epoch][1], model[1].weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained[1].weight, model[1].weight, rtol=1e-5, atol=1e-6)


def test_a_microbatch_gives_the_gradient_of_the_batch():
    data, results = small_data(), []
    for microbatch in (None, 8, 64):
        network = small_network()
        fit(network, data, Standard(), epochs=3, batch_size=32, microbatch=microbatch)
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0], results[2])


def write_data(folder: Path, images: int = 400, name: str = "tiny") -> str:
    x, y = (torch.rand(images, 16, 16) * 255).byte().numpy(), (np.arange(images) % 10).astype(np.int64)
    path = folder / f"{name}.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:200], y_test=y[:200])
    return str(path)


def test_resume_after_a_kill_gives_the_same_victim(tmp_path, capsys):
    """SmoothAdv, whose radius grows from epoch to epoch; killed in the middle, resumed, compared bit by bit."""
    out, whole, metrics = (str(tmp_path / name) for name in ("m.safetensors", "w.safetensors", "m.jsonl"))
    command = ["train", "--method", "smoothadv", "--sigma", "0.25", "--data", write_data(tmp_path), "--epochs", "12"]
    command += ["--batch-size", "20", "--metrics", metrics, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "pacd_fast", *command, "--out", out], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (Path(metrics).exists() and len(Path(metrics).read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Path(out + ".partial").exists() and not Path(out).exists()
    assert main([*command, "--lr", "0.5", "--out", out, "--resume"]) == 2
    assert "another run: lr" in capsys.readouterr().err
    assert main([*command, "--epochs", "1", "--out", out, "--resume"]) == 2
    assert "epochs already, and 1 are asked for" in capsys.readouterr().err
    assert main([*command, "--model", "convnet", "--out", out, "--resume"]) == 2
    assert "another run: model" in capsys.readouterr().err
    assert main([*command, "--out", out, "--resume"]) == 0
    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(12)) and not Path(out + ".partial").exists()
    assert main([*command, "--out", whole]) == 0
    assert checkpoints.load(out).fingerprint == checkpoints.load(whole).fingerprint
    before = Path(out).stat().st_mtime_ns  # done already: nothing is trained again, and another recipe is refused
    assert main([*command, "--out", out, "--resume"]) == 0 and Path(out).stat().st_mtime_ns == before
    assert main([*command, "--drops", "1", "--out", out, "--resume"]) == 2
    assert "drops is none there and 1 here" in capsys.readouterr().err
    assert main([*command, "--seed", "7", "--out", out, "--resume"]) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Breaks:
        calls = 0

        def __call__(self, model, x, y, *, seed):
            self.calls += 1
            value = nn.functional.cross_entropy(model(x), y)
            return value * float("nan") if self.calls == 7 else value

    checkpoint = tmp_path / "c.pt"
    with pytest.raises(ValueError, match=r"the loss is nan at epoch 1, step 2 \(noise seed \d+\)"):
        fit(small_network(), small_data(), Breaks(), epochs=3, batch_size=16, checkpoint=checkpoint)
    state = torch.load(checkpoint)
    assert state["epoch"] == 1 and all(torch.isfinite(value).all() for value in state["model"].values())


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    checkpoint = tmp_path / "c.pt"
    with pytest.raises(ValueError, match=r"weights are not finite after epoch 0, step 0 \(noise seed \d+\)"):
        fit(small_network(), small_data(), Standard(), epochs=1, lr=1e39, batch_size=64, checkpoint=checkpoint)
    assert not checkpoint.exists()


def test_a_mask_of_infinities_is_no_failure(tmp_path):
    model = small_network()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    fit(model, small_data(), Standard(), epochs=1, checkpoint=tmp_path / "c.pt")
    assert torch.equal(torch.load(tmp_path / "c.pt")["model"]["mask"], model.mask) and bool(model.mask.isinf().any())


def first_loss(model, x, y, *, seed):
    return nn.functional.cross_entropy(model(x), y)


def second_loss(model, x, y, *, seed):
    return 2 * nn.functional.cross_entropy(model(x), y)


def test_only_the_same_run_is_resumed(tmp_path):
    data = small_data()
    options = {"epochs": 1, "checkpoint": tmp_path / "c.pt", "resume": True}
    fit(small_network(), data, first_loss, **options)
    with pytest.raises(ValueError, match="another run: loss is .*first_loss.* there and .*second_loss"):
        fit(small_network(), data, second_loss, **options)
    bent = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match="another run: model"):
        fit(bent, data, first_loss, **options)


def test_metrics_replace_no_file_of_another_kind(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match="no file of metrics"):
        fit(small_network(), small_data(), Standard(), epochs=1, metrics=path)
    assert path.read_text() == "mine"


def test_augmentation_flips_and_crops():
    """Every image becomes one of its 2 * 81 crops, and all of them occur."""
    image = torch.arange(1.0, 76.0).view(1, 3, 5, 5)
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    flipped = nn.functional.pad(image.flip(3), (4, 4, 4, 4))
    crops = [wide[..., r : r + 5, c : c + 5] for wide in (padded, flipped) for r in range(9) for c in range(9)]
    crops = {tuple(crop.flatten().tolist()) for crop in crops}
    x = training._augmented(image.expand(4000, 3, 5, 5), torch.Generator().manual_seed(0))
    assert {tuple(each) for each in x.flatten(1).tolist()} == crops


def test_a_sure_network_is_attacked_all_the_same():
    """Gradients of 1e-25, whose squares underflow in float32, are a direction like any other."""
    x = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.tensor([1e-25, -2e-25, 0.0, 2e-25]).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    delta = SmoothAdv.step(x, torch.zeros_like(x), slope, torch.full((2,), 0.3), 2)
    torch.testing.assert_close(delta.flatten(1), torch.tensor([[0.1, -0.2, 0.0, 0.2]] * 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gaussian(0.0), "sigma must be positive"),
        (lambda: Gaussian(0.5, 0), "k must be at least 1"),
        (lambda: Gaussian(0.5, 1.5), "k must be a whole number"),
        (lambda: Gaussian("a"), "sigma must be positive"),
        (lambda: Macer(float("nan")), "sigma must be positive"),
        (lambda: Macer(0.5, k=0), "k must be at least 1"),
        (lambda: Macer(0.5, beta=0.0), "beta must be positive"),
        (lambda: Macer(0.5, gamma=-1.0), "gamma must be positive"),
        (lambda: Macer(0.5, lam=-1.0), "lam must be finite"),
        (lambda: SmoothAdv(0.5, -1.0), "epsilon must be finite"),
        (lambda: SmoothAdv(0.5, 1.0, steps=0), "steps must be at least 1"),
        (lambda: SmoothAdv(0.5, 1.0, warmup=-1), "warmup must be at least 0"),
        (lambda: victims.loss_of("madry", "mnist", {}), "unknown method 'madry'"),
        (lambda: victims.loss_of("gaussian", "mnist", {"beta": 3.0}), "beta is no hyperparameter of gaussian"),
        (lambda: victims.loss_of("standard", "mnist", {"sigma": 3.0}), "sigma is no hyperparameter of standard"),
        (lambda: fit(small_network(), (torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 4])), Standard()), "labels must"),
        (lambda: fit(small_network(), (torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, -1])), Standard()), "labels must"),
        (lambda: fit(small_network(), small_data(), Standard(), epochs=0), "epochs must be at least 1"),
        (lambda: fit(small_network(), small_data(), Standard(), microbatch=0), "microbatch must be at least 1"),
        (lambda: fit(small_network(), small_data(), Standard(), dtype=torch.float16), "dtype must be"),
        (lambda: fit(small_network(), small_data(), Standard(), optimizer="rmsprop"), "unknown optimizer 'rmsprop'"),
        (lambda: fit(nn.Conv2d(1, 2, 3), small_data(), Standard()), "must return logits"),
        (lambda: fit(nn.Linear(7, 4), small_data(), Standard()), r"does not take images \(1, 4, 4\)"),
        (lambda: fit(nn.Flatten(), small_data(), Standard()), "no parameters"),
        (lambda: fit(small_network(), small_data(), Standard(), resume=True), "resume needs checkpoint"),
        (lambda: fit(small_network(), (torch.rand(4, 16), torch.arange(4)), Standard(), augment=True), "augment needs"),
        (lambda: fit(small_network(), (255 * torch.rand(4, *SHAPE), torch.arange(4)), Standard()), r"in \[0, 1\]"),
        (lambda: ops.soft_smooth(torch.rand(2, 3)), "logits must be floating"),
        (lambda: ops.soft_smooth(torch.rand(2, 0, 3)), "logits must be floating"),
        (lambda: ops.soft_smooth(torch.rand(2, 2, 3), -1.0), "beta must be positive"),
        (lambda: soft_radius(torch.tensor([0, 3])), "labels must be in"),
        (lambda: soft_radius(torch.tensor([0])), "labels must be int64"),
        (lambda: soft_radius(torch.tensor([0, 1]), sigma=0.0), "sigma must be positive"),
        (lambda: soft_radius(torch.tensor([0, 1]), squeeze=0.5), "squeeze must be in"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def soft_radius(labels: Tensor, sigma: float = 1.0, squeeze: float = 0.0) -> Tensor:
    return ops.soft_radius(torch.rand(2, 2, 3), labels, beta=1.0, sigma=sigma, squeeze=squeeze)


def test_defaults_per_data_set():
    assert victims.loss_of("macer", "mnist", {"sigma": 0.25}) == Macer(0.25, k=16, beta=16.0, gamma=8.0, lam=16.0)
    assert victims.loss_of("macer", "cifar10", {"sigma": 0.25}) == Macer(0.25, lam=12.0)
    assert victims.loss_of("macer", "cifar10", {"sigma": 0.5}) == Macer(0.5, lam=4.0)
    assert victims.loss_of("macer", "cifar10", {"sigma": 0.5, "lam": 2.0}) == Macer(0.5, lam=2.0)
    assert victims.loss_of("smoothadv", "mnist", {}) == SmoothAdv(0.5, 1.0, steps=2, k=1)
    assert set(victims.hyperparameters()) == {"sigma", "k", "beta", "gamma", "lam", "epsilon", "steps", "warmup"}
