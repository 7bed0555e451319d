"""Random flips and crops of training images, drawn for an epoch before it begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moves_of(order: Tensor, batch_size: int, microbatch: int | None, generator: torch.Generator) -> Tensor:
    """Whether an image is flipped, and where it is cropped: int64 [3, N] in an epoch's order, drawn part by part."""
    drawn = []
    for index in order.split(batch_size):
        for part in index.split(microbatch or batch_size):
            flip = torch.rand(len(part), generator=generator) < 0.5
            drawn.append(torch.cat([flip[None].long(), torch.randint(0, 9, (2, len(part)), generator=generator)]))
    return torch.cat(drawn, 1)


def augmented(x: Tensor, moves: Tensor) -> Tensor:
    """Random horizontal flip and random crop after padding 4, each image its own, as is usual for CIFAR-10."""
    batch, _, height, width = x.shape
    x = torch.where((moves[0] > 0).view(-1, 1, 1, 1), x.flip(3), x)
    rows = moves[1].view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = moves[2].view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, 1, -1)
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    images = torch.arange(batch, device=x.device).view(-1, 1, 1)
    return padded[images, rows, columns].permute(0, 3, 1, 2)
