"""Features that read no label: components, random convolutions, k-means of patches, SimCLR."""

import math

import numpy as np
import pytest
import torch

from pacd_fast import LabelFlipCertifier
from pacd_fast.data import as_float, load_dataset
from pacd_fast.labelflips import simclr
from pacd_fast.labelflips.features import fast_ica, pca, random_convolutions
from pacd_fast.labelflips.patches import kmeans_patches
from pacd_fast.labelflips.simclr import SimCLR, contrastive_loss, train_simclr


def test_whitened_and_independent_components():
    rng = np.random.default_rng(0)
    sources = np.stack(
        [
            rng.uniform(-1, 1, 4000),
            rng.laplace(size=4000),
            np.sign(rng.normal(size=4000)) + 0.1 * rng.normal(size=4000),
        ],
        1,
    )
    mixed = torch.tensor(sources @ rng.normal(size=(3, 5)))
    z = pca(mixed, 3)(mixed)
    assert torch.allclose(z.T @ z / len(z), torch.eye(3, dtype=torch.float64), atol=1e-9)
    found = fast_ica(mixed, 3)(mixed).numpy()
    match = np.abs(found.T @ ((sources - sources.mean(0)) / sources.std(0)) / len(found))
    assert match.max(0).min() > 0.98 and match.max(1).min() > 0.98  # every source, up to order and sign
    with pytest.raises(ValueError, match="dim"):
        pca(mixed, 6)
    with pytest.raises(ValueError, match="directions"):
        pca(mixed, 4)


def test_random_convolutions_are_fixed():
    images = torch.rand(7, 3, 8, 8)
    features = random_convolutions(3, 10)(images)
    assert features.shape == (7, 10) and torch.equal(features, random_convolutions(3, 10)(images))
    assert not torch.equal(features, random_convolutions(3, 10, seed=1)(images))


def digits(train=800, test=300):
    data = load_dataset("mnist5k")
    return (
        as_float(data.x_train[:train]), data.y_train[:train],
        as_float(data.x_test[:test]), data.y_test[:test],
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "size", "stride"), [((3, 9, 11), 4, 1), ((1, 12, 12), 5, 2), ((3, 8, 8), 6, 1)])
def test_patch_features_patch_by_patch(shape, size, stride):
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    images[2] = 0.5  # patches without contrast
    learnt = kmeans_patches(images, 5, size=size, stride=stride, patches=300)
    found = learnt(images).numpy()
    mean, matrix = learnt.whitening.mean.numpy(), learnt.whitening.matrix.numpy()
    centroids = learnt.centroids.double().numpy()
    rows, columns = ((length - size) // stride + 1 for length in shape[1:])
    for image, features in zip(images.double().numpy(), found, strict=True):
        near = np.zeros((rows, columns, 5))
        for r in range(rows):
            for c in range(columns):
                patch = image[:, r * stride : r * stride + size, c * stride : c * stride + size].ravel()
                patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10 / 255**2)
                distance = np.linalg.norm((patch - mean) @ matrix - centroids, axis=1)
                near[r, c] = np.maximum(0, distance.mean() - distance)
        top, left = (rows + 1) // 2, (columns + 1) // 2
        quadrants = near[:top, :left], near[:top, left:], near[top:, :left], near[top:, left:]
        expected = np.sqrt(np.concatenate([part.sum((0, 1)) for part in quadrants]))
        assert features == pytest.approx(expected, abs=2e-3, rel=1e-3)  # of sums of differences of float32 roots


def test_patches_are_whitened_and_seeded():
    images = digits(300)[0]
    state = torch.random.get_rng_state()
    learnt = kmeans_patches(images, 20, patches=5000)
    again, other = kmeans_patches(images, 20, patches=5000), kmeans_patches(images, 20, patches=5000, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(learnt(images[:9]), again(images[:9])) and not torch.equal(learnt.centroids, other.centroids)
    # an image is the same alone and among others, up to rounding
    assert torch.allclose(learnt(images[:9])[3:4], learnt(images[3:4]), atol=1e-3)
    whole = learnt.whitening.matrix @ learnt.whitening.matrix
    values = torch.linalg.eigvalsh(torch.linalg.inv(whole))  # those of the covariance + epsilon
    assert float(values[0]) == pytest.approx(0.1, abs=0.02) and float(values[-1]) > 3


def test_patch_features_tell_more_apart_than_components():
    x, y, test, truth = digits()
    patches, components = kmeans_patches(x, 50, patches=20_000), fast_ica(x.flatten(1), 30)
    accuracy = []
    for features in (patches, lambda images: components(images.flatten(1))):
        certifier = LabelFlipCertifier(0.1).fit(features(x), y)
        accuracy.append(certifier.certify(features(test)).certified_accuracy(truth, 0))
    assert accuracy[0] > 0.88 and accuracy[0] > accuracy[1] + 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kmeans_patches(x, 5, size=28), "size must be in"),
        (lambda x: kmeans_patches(x, 0), "centroids must be in"),
        (lambda x: kmeans_patches(x, 50, patches=49), "centroids must be in"),
        (lambda x: kmeans_patches(x, 5, patches=50)(x[..., :6]), "do not fit patches"),
        (lambda x: kmeans_patches(x, 5, patches=50)(x.expand(-1, 3, -1, -1)), "do not fit patches"),
        (lambda x: train_simclr(x, SimCLR(batch_size=21)), "batch_size must be in"),
        (lambda x: train_simclr(x, SimCLR(batch_size=1)), "batch_size must be in"),
    ],
)
def test_images_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(20, 1, 28, 28))


def test_contrastive_loss_is_equation_1():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    views = [v / v.norm() for v in torch.cat([a, b])]
    losses = []
    for i in range(10):
        j = (i + 5) % 10
        others = sum(math.exp(views[i] @ views[k] / 0.3) for k in range(10) if k != i)
        losses.append(-math.log(math.exp(views[i] @ views[j] / 0.3) / others))
    assert float(contrastive_loss(a, b, 0.3)) == pytest.approx(np.mean(losses), rel=1e-6)


def test_views_are_images_each_of_its_own():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(400, -1, -1, -1)
    for channels in (1, 3):
        seen = simclr._view(x[:, :channels], torch.Generator().manual_seed(1))
        assert seen.shape == (400, channels, 16, 16) and 0 <= float(seen.min()) and float(seen.max()) <= 1
        assert len(seen.flatten(1).unique(dim=0)) == 400
    grey = (seen[:, :1] == seen).flatten(1).all(1).double().mean()
    assert 0.12 < float(grey) < 0.28  # one in five
    turned = simclr._turn_hue(x[:8], torch.linspace(0, 2, 8))
    assert torch.allclose(turned[0], x[0], atol=1e-3) and not torch.allclose(turned[4], x[0], atol=0.1)
    assert torch.allclose(simclr._grey(turned), simclr._grey(x[:8]), atol=1e-3)  # brightness stays
    plain = torch.full((2, 3, 4, 4), 0.4)
    assert torch.allclose(simclr._turn_hue(plain, torch.tensor([1.0, 2.0])), plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simclr_learns_to_know_views(dtype):
    """A few steps on the CPU: the loss falls well below that of chance, the same seed is the same run."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(48, 3, 2, 2, generator=generator).repeat_interleave(6, 2).repeat_interleave(6, 3)
    settings = SimCLR(
        epochs=25, batch_size=24, width=4, projection=16, temperature=0.2, learning_rate=5e-3, dtype=dtype
    )
    losses = []
    state = torch.random.get_rng_state()
    encoder = train_simclr(images, settings, after_epoch=lambda epoch, loss: losses.append(loss))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(losses) == 25 and np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.15  # its deviation is 0.05
    features = encoder(images)
    assert features.shape == (48, 32) and not encoder.training and not features.requires_grad
    if dtype == torch.float32:
        few = SimCLR(epochs=2, batch_size=24, width=4)
        first, second, other = (train_simclr(images, few, seed=seed)(images) for seed in (3, 3, 4))
        assert torch.equal(first, second) and not torch.equal(first, other)
