"""Votes: argmax and histogram in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pacd_fast.ops.libraries import ALL_FLOATS, operators, require, require_device


def add_votes_(counts: Tensor, logits: Tensor, image_index: Tensor, void: Tensor | None = None) -> Tensor:
    """Votes: counts[image_index[m], argmax(logits[m])] += 1 for every row m, in one pass; the lowest index wins a tie.

    In plain torch ``counts.index_put_((image_index, logits.argmax(1)), one, accumulate=True)``.  A row that holds a
    NaN, or whose largest logit is infinite (the model overflowed, which class is first is an accident), does not vote.

    Args:
        counts: int64 [N, classes], contiguous, changed in place.
        logits: float32, bfloat16, float16 or float64 [M, classes], compared in their own dtype.
        image_index: int64 [M] in [0, N).  On the CPU an index outside raises; on CUDA its row is left out.
        void: bool [M], which rows are void (`lattice_copies`): these do not vote, whatever is in them, and are counted
            in a last column, so that counts is [N, classes + 1].

    Returns:
        int64 [N]: per image the rows that do not vote, NaN or infinite.

    Raises:
        ValueError: for wrong shapes, dtypes or devices.
    """
    require_device(counts)
    require(
        counts.dtype == torch.int64 and counts.dim() == 2 and counts.is_contiguous(),
        "counts must be a contiguous int64 [N, classes]",
    )
    classes = counts.shape[1] - (void is not None)
    require(
        logits.dim() == 2 and logits.shape[1] == classes and classes > 0 and logits.dtype in ALL_FLOATS,
        lambda: (
            f"logits must be float32, bfloat16, float16 or float64 [M, {classes}], "
            f"not {logits.dtype} {tuple(logits.shape)}"
        ),
    )
    require(
        image_index.dtype == torch.int64 and image_index.shape == logits.shape[:1],
        lambda: f"image_index must be int64 [{logits.shape[0]}]",
    )
    require(
        void is None or (void.dtype == torch.bool and void.shape == logits.shape[:1]),
        lambda: f"void must be bool [{logits.shape[0]}]",
    )
    others = (logits, image_index) if void is None else (logits, image_index, void)
    require(all(each.device == counts.device for each in others), "all tensors must be on one device")
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and image_index.numel() > 0:
        low, high = image_index.aminmax()
        require(0 <= int(low) and int(high) < counts.shape[0], lambda: f"image_index must be in [0, {counts.shape[0]})")
    return operators.add_votes_(counts, logits.detach(), image_index, void)


def tally_votes(counts: Tensor, logits: Tensor, image_index: Tensor, void: Tensor | None = None) -> None:
    """`add_votes_` without its checks, for loops that made image_index themselves: a row outside [0, N) is left out."""
    operators.add_votes_(counts, logits, image_index, void)


@torch.library.register_fake("pacd_fast::add_votes_")
def _(counts, logits, image_index, void=None):
    return counts.new_empty(counts.shape[:1])
