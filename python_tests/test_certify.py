"""Certification: known radii, coverage, invariance of certificates, Cohen et al.'s interface, bad models and input."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import pacd_fast
from pacd_fast import _C, ops
from pacd_fast.certification.noise import Copies
from pacd_fast.networks import build
from pacd_fast.ops import reference
from pacd_fast.randomness import Stream


class Plane(nn.Module):
    """A linear classifier of two classes: the smoothed one is the same, and the certified radius is the distance."""

    def __init__(self, weight: list[float], offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.tensor(weight)), offset

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.offset
        return torch.stack([-score, score], 1)

    def distance(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1) @ self.weight.detach().double() + self.offset) / float(
            self.weight.detach().double().norm()
        )


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    return build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval()


def same(a: pacd_fast.Certificates, b: pacd_fast.Certificates) -> bool:
    fields = ("prediction", "radius", "p_lower", "counts", "selection_counts")
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in fields)


def test_radius_of_a_plane():
    plane, x = Plane([3.0, -4.0], 0.5), torch.tensor([[0.9, 0.1], [0.2, 0.9], [0.5, 0.6]])
    found = pacd_fast.certify(plane, x, num_classes=2, sigma=0.25, n=200_000, seed=1)
    distance = plane.distance(x)
    assert found.prediction.tolist() == (distance > 0).long().tolist()
    assert bool((found.radius <= distance.abs()).all())
    torch.testing.assert_close(found.radius, distance.abs(), atol=0.02, rtol=0)
    assert found.counts.sum(1).tolist() == [200_000] * 3 and found.selection_counts.sum(1).tolist() == [100] * 3
    assert found.radius.dtype == found.p_lower.dtype == torch.float64 and found.counts.dtype == torch.int64


def test_wrong_certificates_are_rarer_than_alpha():
    """Points at many distances: a radius beyond the true distance, or the wrong class, is as rare as promised."""
    alpha, images = 0.05, 3000
    plane = Plane([1.0, 0.0], 0.0)
    x = torch.stack(
        [torch.rand(images, generator=torch.Generator().manual_seed(0)) * 0.6 - 0.3, torch.zeros(images)], 1
    )
    found = pacd_fast.certify(plane, x, num_classes=2, sigma=0.5, n0=20, n=500, alpha=alpha, seed=2, batch_size=20_000)
    distance = plane.distance(x)
    signed = torch.where(found.prediction == 1, distance, -distance)
    wrong = (found.prediction != -1) & (found.radius > signed)
    assert 0.3 < float((found.prediction != -1).double().mean()) < 0.999
    assert int(wrong.sum()) <= alpha * images + 4 * math.sqrt(alpha * images)
    # and the bound is not idle: it is wrong nearly alpha of the time where the class is clear
    assert int(wrong.sum()) > 0.3 * alpha * images


def test_certificates_do_not_depend_on_batches_threads_order_or_company(network):
    x = torch.rand(4, 1, 28, 28)
    options = dict(num_classes=10, sigma=0.5, n0=50, n=600, seed=5)
    whole = pacd_fast.certify(network, x, batch_size=64, **options)
    threads = torch.get_num_threads()
    try:
        for batch_size, count in ((1000, 1), (100, 2), (777, 2), (None, 1)):
            torch.set_num_threads(count)
            assert same(whole, pacd_fast.certify(network, x, batch_size=batch_size, **options))
    finally:
        torch.set_num_threads(threads)
    ids = torch.tensor([2, 0])
    part = pacd_fast.certify(network, x[ids], image_ids=ids, batch_size=256, **options)
    assert torch.equal(part.counts, whole.counts[ids]) and torch.equal(part.radius, whole.radius[ids])
    other = pacd_fast.certify(network, x, batch_size=64, **{**options, "seed": 6})
    assert not torch.equal(other.counts, whole.counts)


def test_a_seed_is_drawn_and_reported(network):
    x = torch.rand(1, 1, 28, 28)
    options = dict(num_classes=10, sigma=0.5, n0=20, n=500)
    first, second = (pacd_fast.certify(network, x, **options) for _ in range(2))
    assert first.seed != second.seed
    assert same(first, pacd_fast.certify(network, x, seed=first.seed, **options))


def test_selection_and_estimation_never_share_samples(network, monkeypatch):
    """Every sample of every image is drawn once, selection and estimation on streams of their own."""
    drawn = []
    draw = Copies.draw

    def noted(self, out, rows):
        found = [(int(self.ids[image]), stream, sample) for image, stream, sample in rows.tolist()]
        drawn.extend(row for row in found if row[1] != Stream.TUNING)  # a batch's padding
        return draw(self, out, rows)

    monkeypatch.setattr(Copies, "draw", noted)
    options = dict(num_classes=10, sigma=0.5, n0=7, n=50, batch_size=64, futility=0)
    pacd_fast.certify(network, torch.rand(3, 1, 28, 28), **options)
    assert sorted(drawn) == [(i, s, k) for i in range(3) for s, n in ((0, 7), (1, 50)) for k in range(n)]


@pytest.mark.parametrize("noise", ["lattice", "float"])
def test_selection_and_estimation_are_votes_on_their_own_streams(network, noise):
    """Counts are those of the documented noise: selection on stream 0, estimation on stream 1."""
    x, ids = torch.rand(2, 1, 28, 28), torch.tensor([7, 0])
    found = pacd_fast.certify(
        network, x, num_classes=10, sigma=0.5, n0=64, n=128, seed=5, noise=noise, image_ids=ids, futility=0
    )
    for stream, count, counts in ((0, 64, found.selection_counts), (1, 128, found.counts)):
        if noise == "float":
            noisy = ops.noisy_copies(x, 0.5, count, 5, image_ids=ids, stream=stream)
        else:
            noisy, voids = ops.lattice_copies(x, 0.5, count, 5, step=1 / 255, image_ids=ids, stream=stream)
            assert not bool(voids.any())
        with torch.no_grad():
            votes = network(noisy).argmax(1).view(2, count)
        assert [votes[i].bincount(minlength=10).tolist() for i in range(2)] == counts.tolist()
    assert not torch.equal(found.selection_counts * 2, found.counts)


def test_sigma_is_the_float32_number_that_the_noise_has():
    """For 0.7 it is smaller than the double, and a radius of the double would be too large."""
    plane, x = Plane([1.0, 0.0], 0.0), torch.tensor([[2.0, 0.0]])
    found = pacd_fast.certify(plane, x, num_classes=2, sigma=0.7, n=1000, seed=1)
    z = float(ops.normal_quantile(found.p_lower)[0])
    assert float(found.radius[0]) == _C.product_down(float(torch.tensor(0.7)), z) < _C.product_down(0.7, z)
    assert found.noise.sigma == float(torch.tensor(0.7))


def test_smooth_is_a_drop_in(network):
    x = torch.rand(1, 28, 28)
    ours, theirs = pacd_fast.Smooth(network, 10, 0.05, seed=1), reference.Smooth(network, 10, 0.05)
    label, radius = ours.certify(x, 100, 5000, 0.001, 1000)
    expected, published = theirs.certify(x, 100, 5000, 0.001, 1000)
    assert isinstance(label, int) and isinstance(radius, float)
    assert label == expected and radius == pytest.approx(published, abs=0.01)
    assert ours.predict(x, 500, 0.001, 100) == label
    assert pacd_fast.Smooth.ABSTAIN == -1
    noisier = pacd_fast.Smooth(network, 10, 0.25, seed=1)
    assert noisier.certify(x, 100, 3000, 0.001) != noisier.certify(x, 100, 3000, 0.001)  # new noise every call


def test_predict_agrees_with_the_binomial_test():
    """Sequential prediction answers what PREDICT of Cohen et al. answers on all n samples, or it is a close call."""
    plane, x = Plane([1.0], 0.0), torch.tensor([0.03])
    answers = []
    for seed in range(40):
        prediction = pacd_fast.Smooth(plane, 2, 0.5, seed=seed).predict(x, 400, 0.1)
        counts = pacd_fast.certify(
            plane, x.unsqueeze(0), num_classes=2, sigma=0.5, n=400, alpha=0.1, seed=seed, futility=0
        ).counts[0]
        assert int(counts.sum()) == 400
        answers.append(
            (prediction, int(counts.argmax()) if binomtest(int(counts.max()), 400, 0.5).pvalue <= 0.1 else -1)
        )
    assert sum(one != other for one, other in answers) <= 8 and {-1, 1} <= {one for one, _ in answers}


def test_bfloat16_is_the_model_in_bfloat16(network):
    x = torch.rand(1, 1, 28, 28)
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, batch):
            seen.append((batch.dtype, self.inner.training, next(self.parameters()).dtype, len(batch)))
            return self.inner(batch)

    watched = Watched().train()
    options = dict(num_classes=10, sigma=0.5, n0=50, n=1000, seed=5)
    half = pacd_fast.certify(watched, x, dtype=torch.bfloat16, **options)
    assert {entry[:3] for entry in seen} == {(torch.bfloat16, False, torch.bfloat16)}
    assert len({rows for *_, rows in seen}) == 1, "every batch has the same shape"
    assert watched.training and next(watched.parameters()).dtype == torch.float32, "the caller's module is left alone"
    assert int((half.counts - pacd_fast.certify(network, x, **options).counts).abs().sum()) < 100


def test_any_callable_and_any_image_shape():
    found = pacd_fast.certify(
        lambda x: x.flatten(1)[:, :3], torch.tensor([[[0.0, 9.0, 0.0]]]), num_classes=3, sigma=0.5, n=100
    )
    assert found.prediction.tolist() == [1]
    assert pacd_fast.certify(lambda x: x, torch.zeros(0, 3), num_classes=3, sigma=0.5).prediction.shape == (0,)


class Broken(nn.Module):
    """Returns NaN for one of a thousand samples of images whose first pixel is above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, :3].clone()
        logits[::100][x.flatten(1)[::100, 0] > 50] = torch.nan
        return logits


def test_nan_is_an_error_that_names_the_image():
    x = torch.zeros(3, 3)
    x[1, 0] = 100
    with pytest.raises(ValueError, match=r"NaN or infinity for \d+ of \d+ noisy copies of image 17"):
        pacd_fast.certify(Broken(), x, num_classes=3, sigma=0.1, n=1000, image_ids=torch.tensor([5, 17, 6]))
    each = pacd_fast.certify_each(
        Broken(), x, num_classes=3, sigma=0.1, n=1000, seed=1, image_ids=torch.tensor([5, 17, 6]), batch_size=64
    )
    assert next(each).index == 0, "what is on its way when the NaN comes is not lost"
    with pytest.raises(ValueError, match="NaN"):
        list(each)


BAD = {
    "sigma": {"sigma": 0.0},
    "sigma must be positive and finite": {"sigma": math.inf},
    "alpha": {"alpha": 1.0},
    "n0 and n": {"n0": 0},
    "n = 9 is too small .* n = 10, .* radius": {"n": 9},
    "num_classes": {"num_classes": 1},
    "seed": {"seed": -1},
    "batch_size": {"batch_size": 0},
    "dtype": {"dtype": torch.int64},
    "image_ids must be int64": {"image_ids": torch.tensor([1.0])},
    "image_ids must be in": {"image_ids": torch.tensor([-1])},
    "num_classes must be at least 2 and": {"num_classes": -3},
    "num_classes must be at least 2 and below": {"num_classes": 10**12},
    "batch_size must be a whole number": {"batch_size": 1.5},
    "n0 must be below 2": {"n0": 10**14},
    r"logits \[\d+, 4\], not": {"num_classes": 4},
    "images must be": {"images": torch.zeros(1, 3, dtype=torch.int32)},
    "images hold NaN": {"images": torch.full((1, 3), torch.nan)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error_before_any_sample(message):
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        return x.flatten(1)

    options = {"images": torch.zeros(1, 3), "num_classes": 3, "sigma": 0.5, "n": 1000, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        pacd_fast.certify(model, options.pop("images"), **options)
    assert not calls or "logits" in message


@pytest.mark.cuda
def test_cuda_certifies_like_the_cpu(network):
    x = torch.rand(4, 1, 28, 28)
    options = dict(num_classes=10, sigma=0.5, n=20_000, seed=5)
    there = pacd_fast.certify(network.cuda(), x.cuda(), **options)
    here = pacd_fast.certify(network.cpu(), x, **options)
    # the noise is the same bit for bit; logits may differ in the last place, and with them a vote near a tie
    assert int((there.counts - here.counts).abs().sum()) <= 0.002 * 4 * 20_000
    assert torch.equal(there.prediction, here.prediction)


def test_float64_pixels_must_be_float32_numbers():
    """Else the certificate would be about another image than the one that was given."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).double()
    options = {"num_classes": 2, "sigma": 0.25, "n": 100, "seed": 1}
    exact = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    assert torch.equal(
        pacd_fast.certify(model, exact, **options).counts, pacd_fast.certify(model, exact.float(), **options).counts
    )
    for run in (pacd_fast.certify, pacd_fast.soft_certify):
        with pytest.raises(ValueError, match=r"images.float\(\)"):
            run(model, torch.tensor([[100000003.0, 0.0]], dtype=torch.float64), **options)


def test_numbers_are_refused_before_sampling():
    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("sampled")

    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="n must be below 2\\^31"):
        pacd_fast.certify(never, x, num_classes=2, sigma=0.5, n=2**31)
    with pytest.raises(ValueError, match="alpha must be in"):
        pacd_fast.certify(never, x, num_classes=2, sigma=0.5, alpha=1 - 1e-9)
    with pytest.raises(ValueError, match="alpha must be in"):
        pacd_fast.Smooth(never, 2, 0.5).predict(x[0], 100, 1e-200)
