"""Batch norm folded into convolutions: the same function, plain pairs alone, ours and a stranger's."""

import torch
import torchvision
from torch import nn

from pacd_fast.networks import ConvNet, ResNet


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as after training: nothing is 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.weight, 0.5, 2),
                (module.bias, -1, 1),
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
            ]:
                nn.init.uniform_(tensor, low, high)
    return model.eval()


class Shared(nn.Module):
    """What must not be folded: the convolution's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (self.bn(y) + y).mean((2, 3))


MODELS = [
    (lambda: ResNet(8), 9),
    (lambda: ConvNet(64, 3, 10, 32), None),
    (lambda: torchvision.models.resnet18(num_classes=10), 20),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 2)), 1),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 2)), 0),
    (Shared, 0),
]
"""
"""
