"""Image features without labels by SimCLR (Chen et al. 2020): a network that knows two views of one image for the same.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
2020; the settings for CIFAR-10 are of its appendix B.9.  Meant for a GPU: an epoch of CIFAR-10 is 2e14 multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast.randomness import mix, seeded

__all__ = ["SimCLR", "contrastive_loss", "train_simclr"]


@dataclass(frozen=True)
class SimCLR:
    """Settings of `train_simclr`.

    Attributes:
        epochs: passes over the images.
        batch_size: images of a step; each has two views.
        temperature: of the contrastive loss.
        learning_rate, weight_decay: of Adam; the rate warms up for a tenth of the steps and falls to 0 as a cosine.
        width: filters of the first stage; a feature vector has 8 times as many numbers.
        projection: length of the vectors that the loss compares.
        dtype: of the forward passes, torch.float32 or torch.bfloat16.
    """

    epochs: int = 200
    batch_size: int = 512
    temperature: float = 0.5
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    width: int = 64
    projection: int = 128
    dtype: torch.dtype = torch.float32


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _encoder(channels: int, width: int) -> nn.Sequential:
    """ResNet-18 without its classifier, for small images: a 3x3 convolution first, no max-pooling."""
    stages: list[nn.Module] = []
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        stages += [_Block(inputs, outputs, 1 if stage == 0 else 2), _Block(outputs, outputs, 1)]
        inputs = outputs
    first = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def contrastive_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent, equation 1 of the paper, of two views' vectors a, b [N, d]; the mean over all 2 N views."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, partner)


def _view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, flip, change of colours and, one in five, greys of each image [N, C, H, W] in [0, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(x), generator=generator, device=x.device) * (high - low) + low

    area, ratio = uniform(0.08, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    zero, flip = torch.zeros_like(left), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    where = torch.stack([torch.stack([flip * width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    grid = F.affine_grid(where, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def each(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    jittered = (x * each(uniform(0.6, 1.4))).clamp(0, 1)
    mean = _grey(jittered).mean((1, 2, 3), keepdim=True)
    jittered = ((jittered - mean) * each(uniform(0.6, 1.4)) + mean).clamp(0, 1)
    if x.shape[1] == 3:
        grey = _grey(jittered)
        jittered = ((jittered - grey) * each(uniform(0.6, 1.4)) + grey).clamp(0, 1)
        jittered = _turn_hue(jittered, uniform(-0.1, 0.1) * 2 * math.pi).clamp(0, 1)
    x = torch.where(each(uniform(0, 1)) < 0.8, jittered, x)
    return torch.where(each(uniform(0, 1)) < 0.2, _grey(x).expand_as(x), x)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Colours turned about the grey axis, in YIQ coordinates: a rotation of (I, Q) by `angle` [N]."""
    yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = torch.zeros(len(x), 3, 3, device=x.device, dtype=x.dtype)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    return torch.einsum("nij,njhw->nihw", torch.linalg.inv(yiq) @ turn @ yiq, x)


def train_simclr(
    images: Tensor,
    settings: SimCLR = SimCLR(),
    *,
    seed: int = 0,
    progress: bool = False,
    after_epoch: Callable[[int, float], object] | None = None,
) -> nn.Module:
    """Trains an encoder without labels: images float32 [N, C, H, W] in [0, 1] -> features [N, 8 width].

    Args:
        images: on the device to train on.
        seed: of the weights, the order and the views.
        after_epoch: called with the epoch, from 0, and its mean loss.

    Returns:
        The encoder, in eval mode; `network_features` applies it in batches, `pca` makes fewer of its features.

    Raises:
        ValueError: for fewer images than a batch.
    """
    if not 2 <= settings.batch_size <= len(images):
        raise ValueError(f"batch_size must be in [2, {len(images)}], the number of images, not {settings.batch_size}")
    device = images.device
    with seeded(device, mix(seed, 0)):
        encoder = _encoder(images.shape[1], settings.width).to(device, memory_format=torch.channels_last)
        features = 8 * settings.width
        head = nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, settings.projection)
        ).to(device)  # fmt: skip
    order = torch.Generator().manual_seed(mix(seed, 1))
    views = torch.Generator(device).manual_seed(mix(seed, 2))
    steps = len(images) // settings.batch_size  # what is left over is in another epoch's batches
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.epochs * steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / (0.1 * total + 1)) * (1 + math.cos(math.pi * step / max(total, 1))) / 2,
    )
    encoder.train()
    bar = tqdm(total=total, unit="step", desc="SimCLR", disable=not progress)
    for epoch in range(settings.epochs):
        sum_of_losses = torch.zeros((), device=device)
        for index in torch.randperm(len(images), generator=order)[: steps * settings.batch_size].view(steps, -1):
            x = images[index.to(device)].float()
            both = torch.cat([_view(x, views), _view(x, views)]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, settings.dtype, enabled=settings.dtype != torch.float32):
                a, b = head(encoder(both)).chunk(2)
            loss = contrastive_loss(a, b, settings.temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            sum_of_losses += loss.detach()
            bar.update()
        mean = float(sum_of_losses) / steps
        bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}")
        if after_epoch is not None:
            after_epoch(epoch, mean)
    bar.close()
    return encoder.eval().requires_grad_(False)
