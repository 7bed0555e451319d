"""Arguments for the noise operators, and the ways to call them: on new memory, on given memory, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pacd_fast import ops


def noise() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x = torch.rand(3, 2, 5, 7)
    ids = torch.tensor([9, 2**40 + 3, 0])
    return [
        ((x, 0.5, 3, 7), {}),
        ((x, 0.25, 2, 2**62 + 5), {"first": 2**32 - 2, "image_ids": ids, "stream": 65535}),
        ((x, 1.0, 2, 1), {"memory_format": torch.channels_last, "mean": [0.4, 0.5], "std": [0.2, 0.3]}),
        ((x, 1.0, 1, 1), {"mean": torch.tensor([0.4, 0.5]), "std": torch.tensor([0.2, 0.3])}),
        ((x, 1.0, 2, 1), {"dtype": torch.bfloat16}),
        ((x, 1.0, 2, 1), {"dtype": torch.float16, "memory_format": torch.channels_last}),
        ((x.transpose(1, 3), 1.0, 2, 1), {}),
        ((x[:, :1, ::2, ::3], 1.0, 4, 1), {}),
        ((torch.rand(2, 784), 0.5, 2, 1), {}),
        ((torch.rand(2, 3, 32, 32), 0.5, 2, 1), {"memory_format": torch.channels_last}),
        ((torch.rand(4), 0.5, 2, 1), {}),
        ((torch.rand(1, 129).bfloat16(), 0.5, 2, 1), {}),
        ((x, 0.0, 2, 1), {}),
    ]


def noise_close(ours: Tensor, plain: Tensor) -> None:
    assert ours.shape == plain.shape and ours.dtype == plain.dtype and ours.stride() == plain.stride()
    # Box-Muller errs by 2e-6 at most; a coarser dtype adds half a unit in its last place.
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[ours.dtype]
    limit = 1e-5 + 2 * unit * plain.double().abs().clamp(min=1)
    assert ((ours.double() - plain.double()).abs() <= limit).all()


def noise_out(*args: Any, **options: Any) -> Tensor:
    out = _out(args[0], args[2], options)
    return ops.noisy_copies(*args, **options, out=out)


def _row_table(x: Tensor, copies: int, first: int = 0, stream: int = 0) -> Tensor:
    """(image, stream, sample) of what a call by images draws, the last row first."""
    image, sample = torch.meshgrid(torch.arange(len(x)), first + torch.arange(copies), indexing="ij")
    return torch.stack([image, torch.full_like(image, stream), sample], 2).flatten(0, 1).flip(0).to(x.device)


def _out(x: Tensor, copies: int, options: dict[str, Any]) -> Tensor:
    """Room for copies of x, of NaNs, as the options for it say, which are taken away."""
    dtype, layout = options.pop("dtype", x.dtype), options.pop("memory_format", torch.contiguous_format)
    out = torch.full((len(x) * copies, *x.shape[1:]), torch.nan, dtype=dtype, device=x.device)
    return out.contiguous(memory_format=layout)


def noise_rows(x: Tensor, sigma: float, copies: int, seed: int, **options: Any) -> Tensor:
    out, ids = _out(x, copies, options), options.pop("image_ids", None)
    law = [options.pop(name, None) for name in ("mean", "std")]
    law = [None if each is None else torch.as_tensor(each).to(x.device) for each in law]
    table = _row_table(x, copies, **options)
    ops.operators.noisy_copies_(out, x.float(), ids, sigma, seed, 0, 0, *law, table)
    return out.flip(0)


def lattice_rows(x: Tensor, sigma: float, copies: int, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    out, ids = _out(x, copies, options), options.pop("image_ids", None)
    lattice = ops.lattice_of(x.float(), sigma, options.pop("step"), options.pop("offset", None))
    table = _row_table(x, copies, **options)
    voids = ops.operators.lattice_copies_(out, x.float(), ids, sigma, *lattice, seed, 0, 0, table)
    return out.flip(0), voids.flip(0)


def lattice() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x, levels = torch.rand(3, 2, 5, 7), torch.randint(0, 256, (2, 3, 32, 32)).div(255)
    ids, step = torch.tensor([9, 2**40 + 3, 0]), 1 / 255
    return [
        ((x, 0.5, 3, 7), {"step": step}),
        ((x, 0.25, 2, 2**62 + 5), {"first": 2**32 - 2, "image_ids": ids, "stream": 2**15 - 1, "step": step}),
        ((x, 1.0, 2, 1), {"memory_format": torch.channels_last, "step": [step / 0.2, 0.1], "offset": [-2.0, 0.7]}),
        ((x, 0.01, 2, 1), {"step": torch.tensor([0.01, 0.02], dtype=torch.float64), "offset": 0.3}),
        ((x, 1.0, 2, 1), {"dtype": torch.bfloat16, "step": step}),
        ((x, 0.001, 2, 1), {"dtype": torch.float16, "memory_format": torch.channels_last, "step": step}),
        ((x.transpose(1, 3), 1.0, 2, 1), {"step": step}),
        ((x[:, :1, ::2, ::3], 1.0, 4, 1), {"step": 1e-5}),
        ((torch.rand(2, 784), 0.5, 2, 1), {"step": step}),
        ((levels, 0.5, 2, 1), {"memory_format": torch.channels_last, "step": step}),
        (
            (levels, 0.5, 2, 1),
            {"dtype": torch.bfloat16, "memory_format": torch.channels_last, "step": [step, 0.1, 1e-5]},
        ),
        ((torch.rand(4), 0.5, 2, 1), {"step": step}),
        ((torch.rand(1, 129).bfloat16(), 0.5, 2, 1), {"step": step}),
        ((levels, 0.0, 2, 1), {"step": step}),
    ]


def as_one(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Samples and voids as one tensor."""

    def run(*args: Any, **options: Any) -> Tensor:
        samples, voids = function(*args, **options)
        assert voids.dtype == torch.bool and voids.shape == samples.shape[:1]
        return torch.cat([samples.flatten(1) if samples.dim() > 1 else samples.unsqueeze(1), voids.unsqueeze(1)], 1)

    return run


def lattice_close(ours: Tensor, plain: Tensor) -> None:
    # The cells are equal; a point may be rounded otherwise, by an offset's last place, and again to a coarser dtype.
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[ours.dtype]
    limit = 2 * unit * plain.double().abs().clamp(min=4)
    assert ((ours.double() - plain.double()).abs() <= limit).all()
    assert torch.equal(ours[:, -1], plain[:, -1])


def lattice_out(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out = _out(args[0], args[2], options)
    return ops.lattice_copies(*args, **options, out=out)
