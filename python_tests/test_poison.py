"""The ball of allowed perturbations, rounding to 8 bits inside it, poison files and what they refuse."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from pacd_fast.data import Dataset, as_float
from pacd_fast.poisoning import Ball, Poison

BALLS = [Ball(0.1), Ball(16 / 255), Ball(0.003), Ball(0.5, "l2"), Ball(3.0, "l2"), Ball(1 / 255), Ball(2.0)]


def small(dtype=torch.uint8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 6, 5), generator=generator, dtype=torch.uint8)
    images[::3] = images[::3] // 200 * 255  # many pixels at the ends, as digits have
    if dtype != torch.uint8:
        images = as_float(images)
    labels = torch.arange(40) % 4
    return Dataset("small", images[:30], labels[:30], images[30:], labels[30:], images[:0], labels[:0], tuple("abcd"))


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_rounded_images_are_in_the_ball_and_near(ball, dtype):
    data = small(dtype)
    base = as_float(data.x_train)
    wild = base + 0.7 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    u = ball.project(wild, base)
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    images = ball.rounded(u, data.x_train)
    assert images.dtype == dtype and images.shape == u.shape
    assert float(ball.distortion(images, data.x_train).max()) <= ball.epsilon
    step = 1.001 / 255 if dtype == torch.uint8 else 2e-6
    assert float((as_float(images) - u).abs().max()) <= step
    assert torch.equal(ball.rounded(as_float(images), data.x_train), images)  # nothing is lost twice


@pytest.mark.parametrize("short", [1e-7, 1e-6, 1e-5])
def test_whole_levels_just_outside_an_l2_ball_are_brought_into_it(short):
    """The projection ends a hair below whole levels; counted as whole, as they are inside, they would be outside."""
    base = torch.full((2, 1, 1, 3), 100, dtype=torch.uint8)
    delta = torch.tensor([[3.0, -4.0, 0.0], [2.0, 3.0, -6.0]]).view(2, 1, 1, 3)
    for image, length in enumerate((5.0, 7.0)):
        ball, u = Ball(length * (1 - short) / 255, "l2"), as_float(base) + delta / 255
        images = ball.rounded(ball.project(u, as_float(base)), base)
        assert float(ball.distortion(images, base)[image]) <= ball.epsilon
        moved = (images[image].double() - 100).abs()
        assert bool((moved <= delta[image].abs()).all()) and float(moved.sum()) >= float(delta[image].abs().sum()) - 3
    exact = Ball(7 / 255, "l2").rounded(as_float(base) + delta / 255, base)
    assert torch.equal(exact.double() - 100, delta.double())  # on the border nothing is lost


def test_projection_is_the_nearest_point():
    base = torch.tensor([[0.0, 0.5, 1.0]])
    u = torch.tensor([[-0.3, 0.58, 0.95]])
    torch.testing.assert_close(Ball(0.1).project(u, base), torch.tensor([[0.0, 0.58, 0.95]]))
    torch.testing.assert_close(Ball(0.04).project(u, base), torch.tensor([[0.0, 0.54, 0.96]]))
    outwards = torch.tensor([[0.0, 0.9, 0.7]])  # a perturbation of length 0.5: to the ball along its own direction
    torch.testing.assert_close(Ball(0.25, "l2").project(outwards, base), torch.tensor([[0.0, 0.7, 0.85]]))
    inside = torch.tensor([[0.01, 0.51, 0.99]])
    assert torch.equal(Ball(0.25, "l2").project(inside, base), inside)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_uniform_noise_fills_the_ball(norm):
    base = torch.full((4000, 3), 0.5)
    noise = Ball(0.1, norm).fill(base, torch.Generator().manual_seed(0)) - base
    size = noise.abs().amax(1) if norm == "linf" else noise.norm(dim=1)
    share = (size / 0.1) ** 3  # uniform in [0, 1] for a uniform point of a 3-dimensional ball
    assert float(size.max()) <= 0.1 + 1e-6 and abs(float(share.mean()) - 0.5) < 4 / (12 * 4000) ** 0.5


def made(data: Dataset) -> Poison:
    index = torch.tensor([1, 5, 9, 29])
    u = as_float(data.x_train[index]) + 0.2
    return Poison.craft("random", data, index, u, Ball(0.1), {"target_class": 1})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_file_comes_back_and_applies(tmp_path, dtype):
    data = small(dtype)
    poison = made(data)
    poison.save(tmp_path / "p.npz")
    again = Poison.load(tmp_path / "p.npz")
    assert again.settings == {"train_images": 30, "validation": 0, "target_class": 1}
    assert (again.attack, again.ball, again.data) == (poison.attack, poison.ball, poison.data)
    poisoned = again.apply(data)
    changed = (poisoned.x_train != data.x_train).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= {1, 5, 9, 29} and len(changed) == 4
    assert torch.equal(poisoned.y_train, data.y_train) and torch.equal(poisoned.x_test, data.x_test)
    assert float(again.distortion(data).max()) <= 0.1
    assert poisoned.fingerprint != data.fingerprint and not list(tmp_path.glob(".*"))


def test_poison_for_other_data_is_refused(tmp_path):
    data = small()
    poison = made(data)
    shuffled = dataclasses.replace(data, x_train=data.x_train.flip(0), y_train=data.y_train.flip(0))
    fewer = dataclasses.replace(data, x_train=data.x_train[:20], y_train=data.y_train[:20])
    for other in (shuffled, fewer, dataclasses.replace(data, name="other")):
        with pytest.raises(ValueError, match="the poison was made for small@"):
            poison.apply(other)
    far = poison.images.clone()
    far[0, 0, 0, 0] = 255 - far[0, 0, 0, 0] // 128 * 255
    with pytest.raises(ValueError, match="farther than its epsilon 0.1"):
        dataclasses.replace(poison, images=far).apply(data)
    with pytest.raises(ValueError, match="labels are not the data's"):
        dataclasses.replace(poison, labels=poison.labels.flip(0) + 1).apply(data)
    with pytest.raises(ValueError, match="replaces training image 77"):
        dataclasses.replace(poison, index=torch.tensor([1, 5, 9, 77])).apply(data)
    with pytest.raises(ValueError, match="another dtype or shape"):
        dataclasses.replace(poison, images=poison.images.float()).apply(data)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such poison file"):
        Poison.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "arrays.npz", index=np.arange(3))
    np.savez(tmp_path / "objects.npz", index=np.array([{}]), images=np.zeros(1), labels=np.zeros(1), about="{}")
    poison = made(small())
    poison.save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        parts = dict(file)
    np.savez(tmp_path / "order.npz", **{**parts, "index": parts["index"][::-1]})
    np.savez(tmp_path / "sizes.npz", **{**parts, "labels": parts["labels"][:2]})
    ball = {"attack": "a", "epsilon": 1e9, "norm": "linf", "data": "d@0", "settings": {}}
    np.savez(tmp_path / "ball.npz", **{**parts, "about": json.dumps(ball)})
    np.savez(tmp_path / "deep.npz", **{**parts, "about": "[" * 100_000})
    np.savez(tmp_path / "none.npz", **{k: v[:0] if k != "about" else v for k, v in parts.items()})
    for name in ("text", "arrays", "objects", "order", "sizes", "ball", "deep", "none"):
        with pytest.raises(ValueError, match=rf"{name}.npz.* not a (readable )?poison file"):
            Poison.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="create it first"):
        poison.save(tmp_path / "nowhere" / "p.npz")


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ball_needs_a_size_and_a_norm(epsilon):
    with pytest.raises(ValueError, match="epsilon must be positive"):
        Ball(epsilon)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        Ball(0.1, "l1")


def test_a_ball_of_one_level_moves_8_bit_images_and_a_smaller_one_does_not():
    Ball(1 / 255).check(small())
    Ball(1e-4).check(small(torch.float32))
    with pytest.raises(ValueError, match="below 1/255"):
        Ball(np.nextafter(1 / 255, 0)).check(small())


def test_what_a_poison_is_for_is_read_from_its_settings():
    """Class 0 and image 0 too; and poison compares by what it is, not by its tensors."""
    poison = made(small())
    of_class = dataclasses.replace(poison, settings={"target_class": 0, "targets": [0, 5], "sigma": 0.5})
    assert dataclasses.astuple(of_class.aim) == (0, (0, 5), 0.5)
    with pytest.raises(ValueError, match="names no target images"):
        of_class.targets_aim()
    targeted = dataclasses.replace(poison, settings={"adversarial_class": 0, "target_index": [0]})
    assert dataclasses.astuple(targeted.targets_aim()) == ((0,), 0)
    for wrong in (-1, True, 1.0, "1"):
        with pytest.raises(ValueError, match="not a class"):
            _ = dataclasses.replace(poison, settings={"target_class": wrong}).aim
    for wrong in ([], [-1], [1.0], "0", 0):
        with pytest.raises(ValueError, match="not a list of test images"):
            _ = dataclasses.replace(poison, settings={"adversarial_class": 0, "target_index": wrong}).aim
    assert poison == poison and poison != made(small()) and len({poison, made(small())}) == 2


def test_the_first_image_can_be_poisoned(tmp_path):
    data = small()
    u = as_float(data.x_train[:1]) + 0.2
    Poison.craft("random", data, torch.tensor([0]), u, Ball(0.1), {"target_class": 0}).save(tmp_path / "p.npz")
    changed = (Poison.load(tmp_path / "p.npz").apply(data).x_train != data.x_train).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [0]
