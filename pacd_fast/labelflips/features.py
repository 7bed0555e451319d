"""Features that never see the labels to be certified: networks, PCA, FastICA, random convolutions.

A certificate holds for the features as they are, so they must not depend on labels that an attacker may change: learn
them from other classes, from other data, without labels, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pacd_fast.randomness import seeded

__all__ = ["Whitening", "fast_ica", "network_features", "pca", "random_convolutions", "train_feature_network"]


@dataclass(frozen=True)
class Whitening:
    """An affine feature map x [N, ...] -> (x - mean) @ matrix, float64 [N, dim]."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], -1)
        parts = [(part.double() - self.mean) @ self.matrix for part in flat.split(4096)]
        return torch.cat(parts) if parts else flat.double() @ self.matrix


def mean_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of x [N, d] in float64, in pieces so that x is never copied whole."""
    mean = sum(
        (part.double().sum(0) for part in x.split(4096)), torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    ) / len(x)
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(4096):
        centred = part.double() - mean
        covariance += centred.T @ centred
    return mean, covariance / len(x)


def pca(x: Tensor, dim: int, *, whiten: bool = True) -> Whitening:
    """The top `dim` principal components of x [N, ...], scaled to unit variance with `whiten`."""
    flat = x.reshape(x.shape[0], -1)
    if not 1 <= dim <= min(flat.shape):
        raise ValueError(
            f"dim must be in [1, {min(flat.shape)}] for {flat.shape[0]} points of {flat.shape[1]} numbers, not {dim}"
        )
    mean, covariance = mean_and_covariance(flat)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values[-dim:].flip(0), vectors[:, -dim:].flip(1)
    if whiten:
        if values[-1] <= 1e-12 * values[0]:
            raise ValueError(f"the data has fewer than {dim} directions with variance: lower dim")
        vectors = vectors / values.sqrt()
    return Whitening(mean, vectors)


def fast_ica(x: Tensor, dim: int, *, iterations: int = 200, tolerance: float = 1e-5, seed: int = 0) -> Whitening:
    """The top `dim` independent components of x [N, ...] (Hyvarinen 1999: symmetric fixed point, log cosh contrast).

    PCA whitening first, then w <- E[z g(w'z)] - E[g'(w'z)] w with g = tanh for all components, decorrelated together.
    """
    white = pca(x, dim)
    z = white(x)
    start = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(z.device)
    unmixing = _decorrelate(start)
    for _ in range(iterations):
        moved = torch.zeros_like(unmixing)
        slope = torch.zeros(dim, dtype=torch.float64, device=z.device)
        for part in z.split(8192):
            g = torch.tanh(part @ unmixing.T)
            moved += g.T @ part
            slope += (1 - g * g).sum(0)
        new = _decorrelate(moved / len(z) - (slope / len(z))[:, None] * unmixing)
        change = (1 - (new * unmixing).sum(1).abs()).abs().max()
        unmixing = new
        if change < tolerance:
            break
    return Whitening(white.mean, white.matrix @ unmixing.T)


def _decorrelate(w: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    return u @ v


def random_convolutions(channels: int, dim: int, *, size: int = 5, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Fixed random features of images [N, C, H, W] -> float64 [N, dim]: nothing is learnt, so nothing can be poisoned.

    `dim / 4` random `size` x `size` filters of unit norm, ReLU, average over the four quadrants.
    """
    filters = max(1, math.ceil(dim / 4))
    weight = torch.randn(filters, channels, size, size, generator=torch.Generator().manual_seed(seed))
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    weight = weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

    def features(images: Tensor) -> Tensor:
        parts = [
            nn.functional.adaptive_avg_pool2d(
                torch.relu(nn.functional.conv2d(part.float(), weight.to(part.device))), 2
            ).flatten(1)[:, :dim]
            for part in images.split(1024)
        ]
        return torch.cat(parts).double()

    return features


def train_feature_network(
    images: Tensor, labels: Tensor, *, dim: int = 50, epochs: int = 5, seed: int = 0, learning_rate: float = 2e-3
) -> nn.Module:
    """A small network trained to tell apart *other* classes; its last hidden layer [N, dim] are the features.

    Args:
        images: float32 [N, C, H, W] in [0, 1], of classes that are not to be certified.
        labels: int64 [N], any values.

    Returns:
        The network without its last layer, in eval mode; `network_features` applies it.
    """
    classes, targets = labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    with seeded(torch.device("cpu"), seed):
        c, h, w = images.shape[1:]
        body = nn.Sequential(
            nn.Conv2d(c, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * (h // 4) * (w // 4), dim), nn.ReLU(),
        ).to(images.device, memory_format=torch.channels_last)  # fmt: skip
        head = nn.Linear(dim, len(classes)).to(images.device)
    parameters = [*body.parameters(), *head.parameters()]
    batch = 128
    steps = epochs * math.ceil(len(images) / batch)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(steps, 2))
    body.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch):
            index = index.to(images.device)
            x = images[index].contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(head(body(x)), targets[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return body.eval().requires_grad_(False)


def network_features(network: nn.Module, images: Tensor, *, batch_size: int = 1000) -> Tensor:
    """network(images) in eval mode and in batches: float64 [N, dim]."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part).flatten(1).double() for part in images.split(batch_size)])
