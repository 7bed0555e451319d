"""The figures of models: accuracy under the documented noise, attacks image by image, tables class by class."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pacd_fast import ops
from pacd_fast.randomness import Stream
from pacd_fast.training import Evaluation, distortions, evaluate
from pacd_fast.training.evaluation import ROWS, figures


class Side(nn.Module):
    """Class 1 where the first pixel is above 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        score = self.scale * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([-score, score], 1)


def test_accuracy_under_noise_is_that_of_the_documented_noise():
    """Image by image, over several batches; and near Phi(distance / sigma), so between chance and certainty."""
    copies, images = 64, 3 * ROWS // 64 + 2
    x = torch.rand(images, 1, 2, 2)
    y = (x[:, 0, 0, 0] > 0.5).long()
    found = evaluate(Side(), x, y, sigma=0.4, noise_copies=copies, seed=9).noisy
    noisy = ops.noisy_copies(x, 0.4, copies, 9, stream=Stream.EVALUATION)
    right = (noisy.flatten(1)[:, 0] > 0.5).long().view(images, copies) == y[:, None]
    assert found is not None and torch.equal(found, right.double().mean(1))
    expected = 0.5 * (1 + torch.erf((x[:, 0, 0, 0] - 0.5).abs() / 0.4 / math.sqrt(2)))
    assert float((found - expected).mean().abs()) < 0.03 and 0.55 < float(found.mean()) < 0.85


def test_an_attack_on_an_image_does_not_depend_on_its_company():
    """Images that are done leave the batch; those that stay keep their own noise."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.rand(12, 1, 4, 4)
    with torch.no_grad():
        network[3].weight *= 6
        right = network(x).argmax(1)
    options = {"sigma": 0.3, "copies": 3, "iterations": 12, "seed": 4}
    alike = distortions(network, x, right, **options)
    wrong = right.clone()
    wrong[::2] = (wrong[::2] + 1) % 3  # these are done at once
    mixed = distortions(network, x, wrong, **options)
    # one by one in batches would be the same number but for the last bits of a matrix product
    torch.testing.assert_close(mixed[1::2], alike[1::2], rtol=1e-4, atol=1e-6)
    assert len(set(alike.tolist())) > 4


def test_figures_are_of_their_class():
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    natural = torch.tensor([True, True, False, False, True, True])
    noisy = torch.tensor([0.5, 0.25, 0.75, 0.0, 0.5, 1.0], dtype=torch.float64)
    attacked, distortion = torch.tensor([1, 3, 4]), torch.tensor([0.25, 1.0, 0.75], dtype=torch.float64)
    found = figures([Evaluation(labels, natural, noisy, attacked, distortion)] * 2, 4)
    assert set(found) == {None, 0, 1, 2}  # of class 3 there is none
    assert [found[k].images for k in (None, 0, 1, 2)] == [6, 2, 3, 1]
    assert [found[k].attacked for k in (None, 0, 1, 2)] == [3, 1, 2, 0]
    assert found[0].natural == [0.5, 0.5] and found[1].natural == [2 / 3, 2 / 3] and found[2].natural == [1.0, 1.0]
    assert found[0].noisy == [0.25] * 2 and found[1].noisy == [0.5] * 2 and found[None].noisy == [0.5] * 2
    assert found[0].distortion == [1.0] * 2 and found[1].distortion == [0.5] * 2
    assert found[None].distortion == [2 / 3] * 2 and all(math.isnan(value) for value in found[2].distortion)


def test_pixels_labels_and_sigma_at_the_ends_of_what_is_taken():
    x, y, one = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1]), torch.tensor([0])
    options = {"copies": 2, "iterations": 1}
    assert evaluate(Side(), x, y, sigma=0.5, attacked=one, **options).natural.tolist() == [True, True]
    for wrong in (x - 1e-6, x * (1 + 1e-6)):
        with pytest.raises(ValueError, match=r"float images must be in \[0, 1\]"):
            evaluate(Side(), wrong, y, sigma=0.5, attacked=one, **options)
    for labels, found in (([0, 2], r"\[0, 2\]"), ([-1, 1], r"\[-1, 1\]")):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 2\), the model's classes, and are in {found}"):
            evaluate(Side(), x, torch.tensor(labels))
    for asked in ({"noise_copies": 2}, {"attacked": one}):
        with pytest.raises(ValueError, match="need sigma"):
            evaluate(Side(), x, y, **asked)
