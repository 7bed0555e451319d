"""fit: accuracy, seeds, optimisers against the written-out loop, resuming after a kill, what is refused."""

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

from pacd_fast import ops
from pacd_fast.cli import main
from pacd_fast.data import as_float, load_dataset
from pacd_fast.networks import build, load_checkpoint
from pacd_fast.randomness import mix
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, augmentation, fit, loss_of

SHAPE = (1, 4, 4)


def small_data(images: int = 64, classes: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.rand(images, *SHAPE)
    return x, torch.arange(images) % classes


def small_network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, classes))


@pytest.mark.parametrize(
    "loss, least",
    [(Standard(), 0.9), (Gaussian(0.25), 0.9), (Macer(0.25, k=2, lam=1.0), 0.85), (SmoothAdv(0.25, 0.25), 0.85)],
    ids=str,
)
def test_training_reaches_an_accuracy(loss, least):
    data = load_dataset("mnist5k")
    torch.manual_seed(0)
    network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    fit(network, (data.x_train, data.y_train), loss, epochs=2, batch_size=100)
    with torch.no_grad():
        right = network(as_float(data.x_test)).argmax(1) == data.y_test
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
        order = torch.randperm(64, generator=torch.Generator().manual_seed(mix(5, epoch)))
        for index in order.split(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        assert seen[epoch][0] == epoch
        torch.testing.assert_close(seen[epoch][1], model[1].weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained[1].weight, model[1].weight, rtol=1e-5, atol=1e-6)


def test_a_microbatch_gives_the_gradient_of_the_batch():
    data, results = small_data(), []
    for microbatch in (None, 8, 64, 12):  # 12 leaves a part of 8 in a batch of 32
        network = small_network()
        fit(network, data, Standard(), epochs=3, batch_size=32, microbatch=microbatch)
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    for parts in (results[1], results[3]):
        torch.testing.assert_close(results[0], parts, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0], results[2])


def test_every_part_of_every_step_draws_its_own_noise():
    seeds = []

    def noted(model, x, y, *, seed):
        seeds.append(seed)
        return nn.functional.cross_entropy(model(x), y)

    fit(small_network(), small_data(), noted, epochs=3, batch_size=32, microbatch=16, seed=4)
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 2
    first = list(seeds)
    seeds.clear()
    fit(small_network(), small_data(), noted, epochs=3, batch_size=32, microbatch=16, seed=5)
    assert not set(first) & set(seeds)


def write_data(folder: Path, images: int = 400, name: str = "tiny") -> str:
    x, y = (torch.rand(images, 16, 16) * 255).byte().numpy(), (np.arange(images) % 10).astype(np.int64)
    path = folder / f"{name}.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:200], y_test=y[:200])
    return str(path)


@pytest.mark.slow  # test_cli kills and resumes Gaussian augmentation
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
    assert load_checkpoint(out).fingerprint == load_checkpoint(whole).fingerprint
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
    for changed in (0, 1):  # the last pixel of the last image, or the last label
        other = [part.clone() for part in data]
        other[changed].view(-1)[-1] = 0 if changed else 1 - other[0].view(-1)[-1]
        with pytest.raises(ValueError, match="another run: data"):
            fit(small_network(), tuple(other), first_loss, **options)
    fit(small_network(), data, first_loss, **options)


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
    moves = augmentation.moves_of(torch.arange(4000), 300, 200, torch.Generator().manual_seed(0))
    x = augmentation.augmented(image.expand(4000, 3, 5, 5), moves)
    assert {tuple(each) for each in x.flatten(1).tolist()} == crops


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
        (lambda: loss_of("madry", "mnist", {}), "unknown method 'madry'"),
        (lambda: loss_of("gaussian", "mnist", {"beta": 3.0}), "beta is no hyperparameter of gaussian"),
        (lambda: loss_of("standard", "mnist", {"sigma": 3.0}), "sigma is no hyperparameter of standard"),
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
