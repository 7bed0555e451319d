"""Fixtures, and the one table of operator cases: every registered operator has an entry."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import noise_cases
import pytest
import torch
from torch import Tensor
from torchrun_agent import prepared
from tqdm import tqdm

from pacd_fast import ops
from pacd_fast.ops import reference

# Autograd counts devices at the first backward pass.  Once torch.compile has run it finds some even without a card, and
# starts threads, after which no fork can train.
torch.zeros(1, requires_grad=True).sum().backward()

# tqdm's own lock is shared with forks: one that is killed while it writes its bar would hold it for all after it.  Nor
# may the thread that watches bars have it when a fork begins.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@dataclass(frozen=True)
class Case:
    """A wrapper of pacd_fast.ops, the plain version that specifies it, and arguments to try both with.

    op: the registered operator below the wrapper. close: compares the results (of the wrapper, of the reference).
    """

    op: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: Callable[[], list[tuple[tuple[Any, ...], dict[str, Any]]]]
    close: Callable[[Tensor, Tensor], None]


def _votes() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = torch.randn(500, 7, generator=generator).round().to(dtype)  # rounded: many ties
        logits[::50, 3], logits[::70], logits[::90, 2], logits[::11, 6] = torch.nan, -torch.inf, torch.inf, -torch.inf
        if dtype == torch.float64:
            logits[1::2] += torch.rand(250, 7, generator=generator, dtype=dtype) * 1e-12  # ties in float32
        index = torch.randint(0, 4, (500,), generator=generator)
        cases.append(((torch.ones(4, 7, dtype=torch.int64), logits, index), {}))
    cases.append(
        ((torch.zeros(1, 3, dtype=torch.int64), torch.randn(64, 6)[:, ::2], torch.zeros(64, dtype=torch.int64)), {})
    )
    cases.append(((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), {}))
    for (_, logits, index), _ in cases[:2]:  # with a column for the void ones, which some rows with NaN are, too
        cases.append(((torch.ones(4, 8, dtype=torch.int64), logits, index, torch.arange(500) % 7 == 1), {}))
    return cases


def _with_counts(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(counts: Tensor, *args: Any) -> Tensor:
        counts = counts.clone()
        nan_rows = function(counts, *args)
        return torch.cat([counts, nan_rows.unsqueeze(1)], 1)

    return run


def _binomial() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    k = torch.tensor([[0, 1, 2], [50, 99, 100]])
    alpha = torch.tensor([[0.001], [0.5]], dtype=torch.float64)
    return [
        ((k, 100, 0.001), {}),
        ((torch.arange(0, 100_001, 499), 100_000, 0.001), {}),
        ((torch.arange(0, 100_001, 1999), 100_000, 0.999), {}),
        ((k, torch.tensor(101), alpha), {}),
        ((torch.tensor(7), 10, 0.05), {}),
        ((k[:0], 100, 0.001), {}),
    ]


def _bound_close(ours: Tensor, plain: Tensor) -> None:
    assert ours.shape == plain.shape and ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=0)


def _quantile_arguments() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    p = torch.tensor([[0.5, 0.9, 1e-3], [0.0, 1.0, 1e-200]], dtype=torch.float64)
    many = torch.rand(500, dtype=torch.float64)
    return [((p,), {}), ((p.t(),), {"rounding": "up"}), ((p[:0],), {}), ((p[0, 0],), {}), ((many,), {})]


def _quantile_close(ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


def _stacked(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    return lambda *args: torch.stack(function(*args))


def _influences(n: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    y = torch.randint(0, classes, (n,), generator=generator)
    alpha = torch.randn(5, n, dtype=torch.float64, generator=generator).abs() * (2.0 * (y == 1) - 1)
    return (alpha + 0.5 * torch.randn(alpha.shape, dtype=torch.float64, generator=generator)) * 6 / n, y


def _two_classes() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    cases = [((*_influences(n, 2), q), {}) for n, q in ((40, 0.1), (128, 0.3), (1000, 0.45), (301, 1e-3))]
    alpha, y = _influences(60, 2)
    return [*cases, ((alpha[:, ::2], y[::2], 0.2), {}), ((-alpha, y, 0.2), {}), ((alpha[:0], y, 0.2), {})]


def _pairs() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 3]]).repeat(5, 1, 1)
    return [((*_influences(n, 4), pairs, q, 4), {}) for n, q in ((50, 0.1), (128, 0.5), (1000, 0.7), (301, 1e-3))]


def _tail_close(ours: Tensor, plain: Tensor) -> None:
    # t is found to about 1e-7, and its error enters log_tail squared
    assert ours.shape == plain.shape
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-12, atol=1e-13)


def _pooled() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Channels for SIMD and for what is left over, odd sizes, ties, infinities, and both layouts."""
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in (
            (3, 20, 6, 4),
            (2, 50, 5, 7),
            (2, 16, 2, 2),
            (2, 11, 4, 6),
            (4, 1, 4, 4),
            (1, 3, 9, 2),
            (0, 4, 4, 4),
        ):
            x = torch.randn(shape).mul(2).round().to(dtype)
            x[:, :, :2, :2] = x[:, :, :2, :2].abs().neg()
            if len(x):
                x.view(-1)[:: x.numel() // 2 + 1] = torch.tensor([torch.inf], dtype=dtype)
            cases.append(((x.contiguous(memory_format=torch.channels_last),), {}))
        cases.append(((x.new_ones(2, 5, 4, 4),), {}))
    return [*cases, ((-torch.full((2, 4, 4, 4), torch.inf),), {}), ((-torch.zeros(2, 4, 4, 4),), {})]


def _soft(labels: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for shape in ((7, 16, 10), (3, 5, 3), (2, 37, 100), (4, 1, 2), (0, 4, 3)):
        for dtype in (torch.float32, torch.float64):
            logits = torch.randn(shape, dtype=dtype)
            y = reference.soft_smooth(logits, 4.0).argmax(1)
            y[1:] = (y[1:] + (torch.arange(len(y[1:])) % 3 == 0)) % shape[2]  # some wrong
            cases.append(((logits, y), {"beta": 4.0, "sigma": 0.5}) if labels else ((logits, 4.0), {}))
    transposed = torch.randn(3, 5, 4).transpose(1, 2)
    cases.append(((transposed, torch.tensor([0, 1, 2])), {"beta": 1.0, "sigma": 2.0, "squeeze": 0.0}))
    if not labels:
        cases[-1] = ((transposed,), {})
    return cases


def _soft_close(ours: Tensor, plain: Tensor) -> None:
    # float32's 1 - p cancels in the plain version, to 6e-8, and Phi^-1 has a slope of 300 at most at squeeze 0.001.
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    tolerance = 4e-5 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def _gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        leaf = logits.detach().requires_grad_()
        out = function(leaf, *args, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(out.device)
        return torch.autograd.grad(out, leaf, weights)[0]

    return run


def _tangent(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The product with the Jacobian, as the transpose of that with its transpose."""

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        weights = torch.zeros_like(out, requires_grad=True)
        direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape).to(x.device)
        (slope,) = torch.autograd.grad(out, leaf, weights, create_graph=True)
        return torch.autograd.grad(slope, weights, direction)[0]

    return run


def different_bits(ours: Tensor, theirs: Tensor) -> str | None:
    """How two tensors differ in shape, dtype, layout or bits, where torch.equal is blind to -0; a NaN is a NaN."""
    for name, mine, other in (
        ("shape", ours.shape, theirs.shape),
        ("dtype", ours.dtype, theirs.dtype),
        ("strides", ours.stride(), theirs.stride()),
    ):
        if mine != other:
            return f"{name} {mine} and {other}"
    theirs = theirs.cpu()
    wrong = ours != theirs
    if ours.is_floating_point():
        wrong = (wrong & ~(ours.isnan() & theirs.isnan())) | ((ours == 0) & (ours.signbit() != theirs.signbit()))
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} differ, at {place} {ours[place].item()!r} and {theirs[place].item()!r}"
    )


def _same(ours: Tensor, plain: Tensor) -> None:
    assert torch.equal(ours, plain)


CASES = {
    "noisy_copies": Case(
        "noisy_copies", ops.noisy_copies, reference.noisy_copies, noise_cases.noise, noise_cases.noise_close
    ),
    "noisy_copies, out": Case(
        "noisy_copies_", noise_cases.noise_out, reference.noisy_copies, noise_cases.noise, noise_cases.noise_close
    ),
    "noisy_copies, rows": Case(
        "noisy_copies_", noise_cases.noise_rows, reference.noisy_copies, noise_cases.noise, noise_cases.noise_close
    ),
    "lattice_copies, rows": Case(
        "lattice_copies_",
        noise_cases.as_one(noise_cases.lattice_rows),
        noise_cases.as_one(reference.lattice_copies),
        noise_cases.lattice,
        noise_cases.lattice_close,
    ),
    "lattice_copies": Case(
        "lattice_copies",
        noise_cases.as_one(ops.lattice_copies),
        noise_cases.as_one(reference.lattice_copies),
        noise_cases.lattice,
        noise_cases.lattice_close,
    ),
    "lattice_copies, out": Case(
        "lattice_copies_",
        noise_cases.as_one(noise_cases.lattice_out),
        noise_cases.as_one(reference.lattice_copies),
        noise_cases.lattice,
        noise_cases.lattice_close,
    ),
    "add_votes_": Case("add_votes_", _with_counts(ops.add_votes_), _with_counts(reference.add_votes_), _votes, _same),
    "clopper_pearson_lower": Case(
        "clopper_pearson", ops.clopper_pearson_lower, reference.clopper_pearson_lower, _binomial, _bound_close
    ),
    "clopper_pearson_upper": Case(
        "clopper_pearson", ops.clopper_pearson_upper, reference.clopper_pearson_upper, _binomial, _bound_close
    ),
    "chernoff_newton": Case(
        "chernoff_newton",
        _stacked(ops.chernoff_newton),
        _stacked(reference.chernoff_newton),
        _two_classes,
        _tail_close,
    ),
    "chernoff_newton_pairs": Case(
        "chernoff_newton_pairs",
        _stacked(ops.chernoff_newton_pairs),
        _stacked(reference.chernoff_newton_pairs),
        _pairs,
        _tail_close,
    ),
    "normal_quantile": Case(
        "normal_quantile", ops.normal_quantile, reference.normal_quantile, _quantile_arguments, _quantile_close
    ),
    "max_pool_relu": Case("pool_choose", ops.max_pool_relu, reference.max_pool_relu, _pooled, _same),
    "max_pool_relu, in inference": Case(
        "pool_max", torch.ops.pacd_fast.pool_max, reference.max_pool_relu, _pooled, _same
    ),
    "max_pool_relu, tangent": Case(
        "pool_pick", _tangent(ops.max_pool_relu), _tangent(reference.max_pool_relu), _pooled, _same
    ),
    "max_pool_relu, gradient": Case(
        "pool_spread", _gradient(ops.max_pool_relu), _gradient(reference.max_pool_relu), _pooled, _same
    ),
    "soft_smooth": Case("soft_smooth", ops.soft_smooth, reference.soft_smooth, partial(_soft, False), _soft_close),
    "soft_smooth, gradient": Case(
        "soft_smooth_backward",
        _gradient(ops.soft_smooth),
        _gradient(reference.soft_smooth),
        partial(_soft, False),
        _soft_close,
    ),
    "soft_radius": Case("soft_radius", ops.soft_radius, reference.soft_radius, partial(_soft, True), _soft_close),
    "soft_radius, gradient": Case(
        "soft_radius_backward",
        _gradient(ops.soft_radius),
        _gradient(reference.soft_radius),
        partial(_soft, True),
        _soft_close,
    ),
}


def lowered(case_name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of the registered operator that a case's wrapper makes."""
    case, calls = CASES[case_name], []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "pacd_fast":
                calls.append((func, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with Recorder():
        for args, options in case.arguments():
            case.run(*args, **options)
    return calls


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    reason = (
        ops.cuda_library
        if ops.cuda_library != "loaded"
        else "no CUDA device"
        if not torch.cuda.is_available()
        else None
    )
    if reason is not None and os.environ.get("PACD_REQUIRE_CUDA") == "1":
        pytest.fail(f"PACD_REQUIRE_CUDA=1, but: {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in torchrun's processes: the last bits of a training depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some digits, a network and its certificates."""
    return prepared(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
