"""What is seen of training on the way: the share of right answers, and the first loss that was not finite."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacd_fast.ranks import Ranks


class Watch:
    """The first loss of an epoch that was not finite, kept on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._found = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64, device=device)  # loss, step, part

    def see(self, loss: Tensor, step: int, part: int) -> None:
        here = torch.stack([loss.double(), torch.full_like(loss, step).double(), torch.full_like(loss, part).double()])
        self._found = torch.where((self._found[1] < 0) & ~loss.isfinite(), here, self._found)

    def first(self) -> tuple[float, int, int] | None:
        loss, step, part = self._found.tolist()
        return None if step < 0 else (loss, int(step), int(part))


class Accuracy:
    """How many of the network's last logits are right, whichever loss asked for them; a forward hook sees them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.clear()

    def clear(self) -> None:
        self.last: Tensor | None = None
        self.right, self.voted = torch.zeros((), dtype=torch.int64, device=self.device), 0

    def count(self, y: Tensor, counts: bool) -> None:
        """The logits [len(y) * copies, classes] of the last pass, if that is what they are and they count."""
        logits, self.last = self.last, None
        if counts and logits is not None and logits.dim() == 2 and len(logits) % len(y) == 0:
            votes = logits.detach().argmax(1).view(len(y), -1)
            self.right += (votes == y.unsqueeze(1)).sum()
            self.voted += votes.numel()

    def share(self, ranks: Ranks | None = None) -> float:
        """Of this process, or of all of them."""
        right, voted = int(self.right), self.voted
        if ranks is not None:
            right, voted = ranks.summed(np.array([right, voted])).tolist()
        return right / max(voted, 1)

    def _see(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        self.last = logits

    def __enter__(self) -> Accuracy:
        self._hook = self.model.register_forward_hook(self._see)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()
