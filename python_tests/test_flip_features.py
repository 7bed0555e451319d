"""Features that read no label: components, random convolutions, k-means of patches, SimCLR."""

import numpy as np
import pytest
import torch

from pacd_fast.labelflips.features import fast_ica, pca, random_convolutions


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
