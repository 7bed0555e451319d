"""Calls of every operator, and where a card, or a library of played kernels (operators.cpp), answers otherwise.

As a script, for a library that may write where it should not: python compare.py LIBRARY prints what differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import CASES, different_bits, lowered  # noqa: E402

Call = tuple[str, tuple[Any, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 70  # elements beyond the end of a tensor, so that what is read or written there shows


def guarded(x: Tensor, beyond: float) -> Tensor:
    """x again, with GUARD elements of its storage behind it."""
    storage = torch.cat([x.flatten(), x.new_full((GUARD,), beyond)])
    return storage[: x.numel()].view(x.shape)


def noise_calls() -> Iterator[Call]:
    x, ids = torch.rand(3, 3, 33, 31), torch.tensor([5, 2**47, 0])
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    step, offset = torch.tensor([1 / 255, 0.1, 1e-5], dtype=torch.float64), torch.tensor([0, 0.3, -2.0]).double()
    x[1, 1, 0, :5] = torch.nan  # a row that lattice noise must call void
    rows = torch.stack([torch.randint(0, top, (28,)) for top in (3, 2**15, 2**32)], 1)
    for dtype in FLOATS:
        for last in (False, True):
            layout = torch.channels_last if last else torch.contiguous_format
            out = torch.full((28, 3, 33, 31), torch.nan, dtype=dtype).contiguous(memory_format=layout)
            yield "noisy_copies_", (out, x, ids, 0.5, 7, 0, 0, None, None, rows)
            yield "noisy_copies_", (out, x, None, 0.5, 7, 0, 0, mean, std, rows)
            yield "lattice_copies_", (out, x, ids, 0.5, step, offset, 7, 0, 0, rows)
            yield "noisy_copies", (x, ids, 0.5, 9, 7, 3, 2, dtype, last, None, None)
            yield "noisy_copies", (x, None, 0.5, 9, 7, 3, 2, dtype, last, mean, std)
            yield "lattice_copies", (x, ids, 0.5, step, offset, 9, 7, 3, 2, dtype, last)
            yield "lattice_copies", (x, None, 0.5, step[2:], offset[2:], 9, 7, 3, 2, dtype, last)
        for size in (1, 15, 16, 17, 63, 64, 65, 68, 4096):
            out = guarded(torch.full((6, size), torch.nan, dtype=dtype), -1.0)
            off = torch.full((6 * size + 1,), torch.nan, dtype=dtype)[1:].view(6, size)  # no place for four at once
            yield "noisy_copies_", (off, torch.rand(2, size), None, 0.5, 7, 0, 1, None, None)
            yield "noisy_copies_", (out, torch.rand(2, size), None, 0.5, 7, 0, 1, None, None)
            yield "lattice_copies_", (out, torch.rand(2, size), None, 0.5, step[:1], offset[:1], 7, 0, 1)


def row_calls() -> Iterator[Call]:
    for rows in (1, 255, 256, 257, 8191, 8192, 8193, 20_000):
        for dtype in FLOATS:
            logits = torch.randn(rows + 1, 5).mul(2).round().to(dtype)
            logits[::99, 2], logits[::31, 1], logits[::37, 3] = torch.nan, torch.inf, -torch.inf
            index = torch.randint(0, 9, (rows + 1,))
            yield "add_votes_", (torch.zeros(9, 5, dtype=torch.int64), logits[:rows], index[:rows])
            void = torch.rand(rows) < 0.3
            yield "add_votes_", (torch.zeros(9, 6, dtype=torch.int64), logits[:rows], index[:rows], void)
    skewed = torch.zeros(1, 2, dtype=torch.int64), torch.ones(5000, 2), torch.zeros(5000, dtype=torch.int64)
    yield "add_votes_", skewed
    beyond = torch.zeros(2, 3, dtype=torch.int64), torch.eye(3)
    yield "add_votes_", (*beyond, torch.tensor([0, 1, 1]))
    k, n = torch.randint(0, 101, (9000,)), torch.full((9000,), 100)
    for upper in (False, True):
        yield "clopper_pearson", (k, n, torch.rand(9000, dtype=torch.float64).clamp(1e-9, 0.999), upper)
        yield "normal_quantile", (torch.rand(9000, dtype=torch.float64), upper)


def team_calls() -> Iterator[Call]:
    for rows, n in ((3, 1), (3, 2), (2, 127), (3, 128), (3, 129), (150, 130), (2, 1000)):
        alpha, y = torch.randn(rows, n, dtype=torch.float64) * 6 / n, torch.randint(0, 2, (n,))
        alpha[0] = 0
        alpha[1] = alpha[1].abs() * (2 * y - 1)
        for q in (1e-300, 0.1, 0.4999):
            yield "chernoff_newton", (alpha, y, q)
    pairs = torch.tensor([[0, 1], [3, 2], [4, 0]]).repeat(4, 1, 1)
    for n in (2, 129, 400):
        alpha, y = torch.randn(4, n, dtype=torch.float64) * 6 / n, torch.randint(0, 5, (n,))
        for q in (1e-300, 0.1, 0.79):
            yield "chernoff_newton_pairs", (alpha, y, pairs, q, 5)


def window_calls() -> Iterator[Call]:
    for shape in ((3, 7, 41, 39), (2, 1, 5, 5), (40, 3, 21, 21)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(shape).mul(2).round().to(dtype).contiguous(memory_format=torch.channels_last)
            x[0, 0, 0, 0] = torch.nan
            yield "pool_max", (x,)
            yield "pool_choose", (x,)
            choice = torch.randint(0, 5, (*shape[:2], shape[2] // 2, shape[3] // 2), dtype=torch.uint8)
            yield "pool_pick", (choice, x)
            yield "pool_spread", (choice, torch.randn(choice.shape, dtype=dtype), shape[2], shape[3])


def copies_calls() -> Iterator[Call]:
    for shape in ((700, 3, 3), (3, 17, 2), (40, 33, 7), (1, 100, 5), (5, 16, 3)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype) * 30
            x.view(-1)[::137], x.view(-1)[5::401], x.view(-1)[3::911] = torch.inf, -torch.inf, torch.nan
            mean, grad, y = x.softmax(2).mean(1), torch.randn(shape[0], shape[2], dtype=dtype), x[:, 0].argmax(1)
            yield "soft_smooth", (x, 2.0)
            yield "soft_smooth_backward", (grad, x, 2.0)
            for squeeze in (0.0, 0.001):
                yield "soft_radius", (x, y, 2.0, 0.5, squeeze)
                yield "soft_radius_backward", (grad[:, 0].contiguous(), x, mean, y, 2.0, 0.5, squeeze)


def large_calls() -> Iterator[Call]:
    """Sizes beyond the grid for csrc/launch.h's number of multiprocessors, for a kernel of each executor."""
    torch.manual_seed(2)
    x, step = torch.rand(16, 1, 28, 28), torch.tensor([1 / 255], dtype=torch.float64)
    yield "noisy_copies", (x, None, 0.5, 500, 7, 0, 1, torch.float32, False, None, None)
    yield "lattice_copies", (x, None, 0.5, step, 0 * step, 500, 7, 0, 1, torch.bfloat16, False)
    yield "add_votes_", (torch.zeros(9, 2).long(), torch.randn(1_200_000, 2), torch.randint(0, 9, (1_200_000,)))
    yield "normal_quantile", (torch.rand(1_100_000, dtype=torch.float64), False)
    yield "chernoff_newton", (torch.randn(9000, 7, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0]), 0.2)
    yield "pool_choose", (torch.randn(16, 18, 128, 128),)
    yield "soft_smooth", (torch.randn(70_000, 3, 2), 2.0)


def edge_calls() -> Iterator[Call]:
    """Sizes around a tile, a warp, a block, a grid of played/cuda.h's small card, and beyond it."""
    torch.manual_seed(1)
    for calls in (noise_calls, row_calls, team_calls, window_calls, copies_calls):
        yield from calls()


def table_calls(name: str) -> Iterator[Call]:
    torch.manual_seed(0)
    for function, args in lowered(name):
        yield function.overloadpacket.__name__.split("::")[-1], args


def whole(x: Tensor) -> Tensor:
    """A tensor's storage, what lies behind the tensor's end included."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def copied(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The arguments on a device, with storages of their own."""
    return tuple(
        whole(x).clone().to(device).as_strided(x.shape, x.stride(), x.storage_offset()) if isinstance(x, Tensor) else x
        for x in args
    )


def difference(call: Call, played: Any = torch.ops.pacd_played, device: str = "cpu") -> str | None:
    """What other operators than the CPU's do otherwise: in results, in arguments and in what lies behind these."""
    name, args = call
    here, there = copied(args, "cpu"), copied(args, device)
    answers = []
    for operators, given in ((torch.ops.pacd_fast, here), (played, there)):
        answer = getattr(operators, name)(*given)
        answers.append([] if answer is None else list(answer) if isinstance(answer, tuple | list) else [answer])
    written = [(whole(a), whole(b)) for a, b in zip(here, there, strict=True) if isinstance(a, Tensor)]
    for mine, theirs in [*zip(*answers, strict=True), *written]:
        what = different_bits(mine, theirs)
        if what:
            return f"{name}{[tuple(x.shape) if isinstance(x, Tensor) else x for x in args]}: {what}"
    return None


def outside(operators: Any = torch.ops.pacd_played, device: str = "cpu") -> str | None:
    """What rows of no image show where it is not seen that there is none, but image 0: nothing else may be read."""
    x, step = torch.rand(4, 1, 5, 5, device=device), torch.tensor([1 / 255], dtype=torch.float64, device=device)
    x[1:-1] = x[:1] + 1
    image, zeros = torch.tensor([-1, 2, 7, -(2**62)], device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for name, law in (("noisy_copies_", ()), ("lattice_copies_", (step, 0 * step))):
        found = []
        for each in (image, zeros):
            rows, out = torch.stack([each, zeros, zeros + 3], 1), torch.full((4, 1, 5, 5), torch.nan, device=device)
            getattr(operators, name)(out, x[1:3], None, 0.5, *law, 7, 0, 0, *([] if law else [None, None]), rows)
            found.append(out)
        if what := different_bits(found[1].cpu(), found[0]):
            return f"{name} reads {what} for images {image.tolist()} of 2"
    return None


def main(library: str) -> int:
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    for name in CASES:
        for call in table_calls(name):
            if what := difference(call):
                print(what)
                return 1
    for call in edge_calls():
        if what := difference(call):
            print(what)
            return 1
    if what := outside():
        print(what)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
