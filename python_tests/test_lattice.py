"""Lattice noise: its error bounds over all words, its cells against double-double and mpmath, its law, its bits."""

from __future__ import annotations

import os

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from pacd_fast import _C, ops
from pacd_fast.certification import selftest
from pacd_fast.ops import reference, require_on_lattice
from pacd_fast.ops.lattice import LIMIT, STEP
from pacd_fast.randomness import FURTHER_DIGITS

FIRST, LAST, NOISE_ERROR, ANGLE_ERROR, FURTHER = _C.lattice_constants()
SIGMAS = (0.001, 0.01, 0.12, 0.5, 1.0)  # in steps of 1/255: 0.26, 2.6, 31, 128, 255
THREADS = len(os.sched_getaffinity(0))


def pixels() -> np.ndarray:
    """Levels of 8 bits, and float32 numbers off the lattice."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, 2048).astype(np.float32) / np.float32(255)
    return np.concatenate([levels, rng.random(1024, np.float32), 6 * rng.random(1024, np.float32) - 3])


# --- The error bounds of csrc/math/lattice.h ---


def check_float_error(stride: int) -> None:
    for eighth in range(8):
        error, size = _C.lattice_angle_errors(eighth, stride if eighth == 0 else 64 * stride, THREADS)
        assert error <= ANGLE_ERROR and size <= 1.0
    radius, number = _C.lattice_radius_errors(FIRST, LAST, stride, THREADS)
    print(f"every {stride}. word: radius {radius:.4g}, number {number:.4g}")
    assert 1e-6 < radius <= number <= NOISE_ERROR
    # the range is as it is because the bound does not hold beyond it
    assert _C.lattice_radius_errors(LAST + 2**17, 2**32 - 1, 1 + stride // 8, THREADS)[1] > NOISE_ERROR
    assert _C.lattice_radius_errors(FIRST // 2, FIRST - 1, 1, THREADS)[1] > NOISE_ERROR


def test_float_error_over_a_stride_of_all_words():
    check_float_error(1021)


@pytest.mark.slow
def test_float_error_over_all_words():
    check_float_error(1)


def test_float_error_at_both_ends_of_the_range():
    for begin in (FIRST, LAST - 2**18):
        assert _C.lattice_radius_errors(begin, begin + 2**18, 1, THREADS)[1] <= NOISE_ERROR


def test_exact_radius_and_circle_against_mpmath():
    rng = np.random.default_rng(1)
    edges = [2**k + d for k in range(64) for d in (-1, 0, 1)] + [2**64 - 2**k - d for k in range(63) for d in (0, 1)]
    edges += [int(2**64 * v) + d for v in (0.5**0.5, 0.25, 0.5) for d in (-(2**11), -1, 0, 1, 2**11)]
    digits = [*(e for e in edges if 0 <= e < 2**64), *rng.integers(0, 2**64, 4000, np.uint64).tolist()]
    worst_radius = worst_circle = 0.0
    with mp.workdps(60):
        for d in digits:
            exact = mp.sqrt(-2 * mp.log((mp.mpf(d) + 0.5) / 2**64))
            worst_radius = max(worst_radius, float(abs(_C.lattice_radius(d) / exact - 1)))
            turn = (mp.mpf(d % 2**61) + 0.5) / 2**61 * mp.pi / 4
            exact = [mp.cos(turn), mp.sin(turn)]
            if d >> 61 & 1:
                exact.reverse()
            for value, sine, sign in zip(exact, (False, True), (62, 63), strict=True):
                found = _C.lattice_circle(d >> 32, d & 0xFFFFFFFF, sine)
                worst_circle = max(worst_circle, float(abs(found - (-value if d >> sign & 1 else value))))
    print(f"radius {worst_radius * 2**53:.3g} * 2^-53, circle {worst_circle * 2**53:.3g} * 2^-53")
    assert worst_radius < 2.0**-49 and worst_circle < 2.0**-50


def check_cells(count: int) -> None:
    x = pixels()
    for sigma in SIGMAS:
        found = _C.lattice_cell_errors(x, sigma, STEP, 0.0, 11, -(-count // (len(SIGMAS) * x.size)), THREADS)
        void = found["near"] / found["cells"] / 2**20
        print(f"sigma {sigma}: {found}, open {found['open'] / found['cells']:.3g}, void probability {void:.2g}")
        assert found["cells"] >= count // len(SIGMAS) and found["open"] > 0
        assert found["wrong_quick"] == found["wrong_exact"] == found["voids"] == 0
        assert found["quick_share"] < 1 and found["exact_share"] < 1
        assert void < 1e-10


def test_decided_cells_are_right():
    check_cells(10**7)


@pytest.mark.slow
def test_a_billion_decided_cells_are_right():
    check_cells(10**9)


def test_a_channels_lattice_is_right():
    """Another step and offset, images that were normalised."""
    x = (pixels() - np.float32(0.45)) / np.float32(0.27)
    found = _C.lattice_cell_errors(x, 1.7, STEP / 0.27, -0.45 / 0.27, 12, 200, THREADS)
    assert found["wrong_quick"] == found["wrong_exact"] == found["voids"] == 0 < found["open"]


# --- Which digits are read ---


def test_numbers_are_one_in_python_and_in_cpp():
    assert FURTHER == FURTHER_DIGITS and NOISE_ERROR < 2e-6


def test_open_cells_read_the_documented_digits():
    """With 7 sigma near the limit every cell is open; sine and cosine of a pair must read the same digits."""
    step = 1e-6
    x, sigma, options = torch.rand(2, 3, 8, 9), 0.4, dict(step=step, offset=0.25, first=3, stream=5)
    y, voids = ops.lattice_copies(x, sigma, 2, 2**50 + 7, **options)
    plain, _ = reference.lattice_copies(x, sigma, 2, 2**50 + 7, **options)
    z = reference.lattice_cells(np.zeros(64), sigma, np.full(64, step), np.zeros(64), 1, 0, 0, 0)  # quick and near
    assert np.abs(z).max() > 2**18 and not voids.any()
    assert (y.double() - plain.double()).abs().max() < step / 4


def test_the_portable_kernel_gives_the_bits_of_the_tiles():
    x = torch.rand(1, 200)
    for sigma, step in ((0.5, 1 / 255), (0.3, 1e-6), (0.001, 1 / 255)):
        y, voids = ops.lattice_copies(x, sigma, 300, 9, step=step, stream=3, first=2)
        plain = _C.lattice_points(x[0].numpy(), sigma, step, 0.0, 9, 3, 0, 2, 300)
        assert np.array_equal(plain, y.numpy()) and not voids.any()


# --- The law ---


@pytest.mark.parametrize("sigma", SIGMAS)
def test_cells_have_the_masses_of_a_gaussian(sigma):
    for pixel, offset in ((0.0, 0.0), (0.3, 0.0), (128 / 255, 0.0), (0.7, 0.001)):
        law = (sigma, STEP, offset, pixel)
        assert selftest.lattice_p_value(*selftest.cell_counts(*law, 4_000_000, 3), *law) > 1e-6


def test_the_peer_has_that_law_too():
    """Voracek and Hein's sampler, the benchmark's peer."""
    table = reference.threshold_table(0.12)
    y, voids = reference.threshold_copies(torch.full((1, 1000), 77 / 255), table, 1000)
    counts = torch.bincount((y / STEP).round().long().flatten() + 1000, minlength=2000).numpy()
    assert selftest.lattice_p_value(-1000, counts, 0.12, STEP, 0.0, 77 / 255) > 1e-6
    assert not voids.any() and 2**60 - 600 < int(table[-1]) < 2**60
    torch.manual_seed(0)
    one = reference.threshold_copies(torch.zeros(1, 50), table, 20, one_by_one=True)[0]
    torch.manual_seed(0)
    assert torch.equal(one, reference.threshold_copies(torch.zeros(1, 50), table, 20)[0])


def test_a_little_off_is_noticed():
    """The chi-square sees a sigma that is 1 % too large, and a pixel that is a twentieth of a step away."""
    for sigma, right in ((0.505, (0.5, STEP, 0.0, 0.3)), (0.01, (0.01, STEP, 0.0, 0.3 + STEP / 20))):
        assert selftest.lattice_p_value(*selftest.cell_counts(sigma, STEP, 0.0, 0.3, 4_000_000, 3), *right) < 1e-9


def test_neighbours_are_independent():
    """Cosine and sine of a pair, neighbouring elements, samples and images."""
    y, _ = ops.lattice_copies(torch.zeros(40, 64), 0.5, 2000, 21, step=STEP)
    z = y.double().view(40, 2000, 64) / 0.5
    for a, b in ((z[..., :16], z[..., 16:32]), (z[..., 1:], z[..., :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        for f, variance in ((lambda v: v, 1.0), (lambda v: v * v - 1, 4.0)):
            assert abs(float((f(a) * f(b)).sum())) < 5 * (variance * a.numel()) ** 0.5


def test_neyman_pearson_in_one_dimension():
    """No set of cells loses more probability to a moved pixel than the theorem allows; sets chosen on other draws."""
    count = 2_000_000

    def frequencies(pixel: float, sigma: float, seed: int) -> np.ndarray:
        first, counts = selftest.cell_counts(sigma, STEP, 0.0, pixel, count, seed)
        return np.pad(counts, (first + 5000, 5000 - first - counts.size)) / counts.sum()

    for sigma in SIGMAS:
        for shift in (sigma / 1000, sigma / 4, sigma, 3 * sigma):
            at, moved = frequencies(0.3, sigma, 1), frequencies(0.3 + shift, sigma, 2)
            order = np.argsort(-at / (at + moved + 1e-300))  # the likeliest under x first
            p, q = frequencies(0.3, sigma, 3)[order].cumsum(), frequencies(0.3 + shift, sigma, 4)[order].cumsum()
            # six standard deviations down for p, up for q
            low = (p - 6 * np.sqrt(p * (1 - p).clip(0) / count) - 30 / count).clip(0, 1)
            high = q + 6 * np.sqrt(q * (1 - q).clip(0) / count) + 30 / count
            assert (high >= stats.norm.cdf(stats.norm.ppf(low) - shift / sigma)).all()


# --- What a user meets ---


def test_images_on_the_lattice_come_back():
    """The model sees the data's own numbers: k / 255 as torch divides them."""
    x = torch.arange(256).div(255).view(1, 1, 16, 16)
    for dtype in ops.FLOATS:
        y, voids = ops.lattice_copies(x, 0.0, dtype=dtype, step=STEP)
        assert torch.equal(y, x.to(dtype)) and not voids.any()


def test_the_model_sees_a_function_of_the_cell():
    y, _ = ops.lattice_copies(torch.rand(4, 3, 16, 16) * 2 - 1, 0.5, 500, 8, step=STEP, offset=0.3)
    points = (torch.arange(-3000, 3000).double() * STEP + 0.3).float()
    assert len(y.unique()) < 2000 and (y.unique().unsqueeze(1) - points).abs().amin(1).max() < 1e-6


def test_steps_per_channel():
    x, steps, offsets = torch.rand(2, 3, 7, 9), [1 / 255, 0.02, 0.3], [0.0, -0.7, 0.1]
    y, _ = ops.lattice_copies(x, 0.5, 6, 4, step=steps, offset=torch.tensor(offsets))
    for c in range(3):
        part, _ = ops.lattice_copies(x, 0.5, 6, 4, step=steps[c], offset=offsets[c])
        assert torch.equal(y[:, c], part[:, c])


def test_bits_do_not_depend_on_split_threads_or_layout():
    x, ids, options = torch.rand(3, 3, 33, 31), torch.arange(3) * 3 + 5, dict(step=[0.004, 0.01, 2e-6], offset=0.1)
    whole = ops.lattice_copies(x, 0.5, 13, 11, image_ids=ids, **options)[0]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = ops.lattice_copies(x, 0.5, 13, 11, image_ids=ids, memory_format=torch.channels_last, **options)[0]
            assert torch.equal(whole, again) and again.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_num_threads(threads)
    for i in range(3):
        for first, count in ((0, 1), (1, 5), (6, 7)):
            part = ops.lattice_copies(x[i : i + 1], 0.5, count, 11, first=first, image_ids=ids[i : i + 1], **options)[0]
            assert torch.equal(part, whole.unflatten(0, (3, 13))[i, first : first + count])


def test_undecidable_and_unchecked_copies_are_void():
    half = torch.tensor([[0.25, 1.0], [0.5, 0.25]])  # 0.5 / 1 is a cell's end
    y, voids = ops.lattice_copies(half, 0.0, 2, step=1.0)
    assert voids.tolist() == [False, False, True, True] and torch.isfinite(y).all()
    step, offset = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for bad in (torch.nan, torch.inf, LIMIT, -2 * LIMIT):
        x = torch.zeros(3, 40)
        x[1, 17] = bad
        y, voids = torch.ops.pacd_fast.lattice_copies(x, None, 0.5, step, offset, 2, 1, 0, 0, torch.float32, False)
        assert voids.tolist() == [False, False, True, True, False, False] and torch.isfinite(y).all()
    _, voids = torch.ops.pacd_fast.lattice_copies(x, None, LIMIT, step, offset, 2, 1, 0, 0, torch.float32, False)
    assert voids.all()


def test_there_is_no_gradient():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    y, voids = ops.lattice_copies(x, 0.5, 2, step=STEP)
    assert not y.requires_grad and not voids.requires_grad
    assert not torch.func.grad(lambda x: ops.lattice_copies(x, 0.5, 2, step=STEP)[0].sum())(x.detach()).any()


def test_compiles_without_a_break():
    def votes(x: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
        y, voids = ops.lattice_copies(x, 0.5, 4, 9, first=first, step=STEP, offset=[0.1, 0.2])
        return torch.where(voids, -1, (y.flatten(1) @ weight).argmax(1))

    x, weight = torch.rand(3, 2, 4, 4), torch.randn(32, 5)
    compiled = torch.compile(votes, fullgraph=True, backend="aot_eager")
    for first in (0, 4, 8):
        assert torch.equal(compiled(x, weight, first), votes(x, weight, first))


def test_the_step_that_suits_a_sigma():
    assert ops.lattice_step(1.0) == STEP and ops.lattice_step(4 * STEP) == STEP
    assert ops.lattice_step(3.99 * STEP) == STEP / 2 and ops.lattice_step(1e-3) == STEP / 16
    assert ops.lattice_step(0.3, 1.0) == 1 / 16
    for sigma in (1.0, 0.01, 1e-3, 1e-6, 1e-30):
        halved = np.log2(STEP / ops.lattice_step(sigma))
        assert halved == int(halved) >= 0 and ops.lattice_step(sigma) <= sigma / 4
        assert halved == 0 or ops.lattice_step(sigma) > sigma / 8  # the smallest power of two


def test_images_that_are_not_on_the_claimed_lattice():
    x = torch.arange(256).div(255).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    require_on_lattice(x, STEP)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    steps, offsets = (STEP / std.double()).flatten(), (-mean.double() / std.double()).flatten()
    require_on_lattice((x - mean) / std, steps, offsets)
    for other in (x * 255 / 256, torch.rand(1, 3, 4, 4), (x - mean) / std):
        with pytest.raises(ValueError, match="give the data's own step and offset"):
            require_on_lattice(other, STEP)


BAD = {
    "step must be positive": lambda x: ops.lattice_copies(x, 1.0, step=0.0),
    "step must be positive .above 2.-100.*not nan": lambda x: ops.lattice_copies(x, 1.0, step=float("nan")),
    "not -0.5": lambda x: ops.lattice_copies(x, 1.0, step=[0.1, 0.2, -0.5]),
    "below 2.100.*not inf": lambda x: ops.lattice_copies(x, 1.0, step=float("inf")),
    "step must be a number, or one per channel": lambda x: ops.lattice_copies(x, 1.0, step=[0.1, 0.2]),
    "offset must be a number": lambda x: ops.lattice_copies(x, 1.0, step=0.1, offset=[0.1, 0.2]),
    "offset must be finite": lambda x: ops.lattice_copies(x, 1.0, step=0.1, offset=float("inf")),
    r"below 2\^22 = 4194304, not .* \+ 7e\+06: give a larger step": lambda x: ops.lattice_copies(x, 1.0, step=1e-6),
    "not 4.2": lambda x: ops.lattice_copies(x + 4.2e6, 1.0, step=1.0),
    "finite images": lambda x: ops.lattice_copies(x.log(), 1.0, step=1.0),
    "sigma": lambda x: ops.lattice_copies(x, -1.0, step=1.0),
    "copies": lambda x: ops.lattice_copies(x, 1.0, 0, step=1.0),
    "seed": lambda x: ops.lattice_copies(x, 1.0, 1, -1, step=1.0),
    "samples": lambda x: ops.lattice_copies(x, 1.0, 2, first=2**32 - 1, step=1.0),
    r"stream must be in \[0, 2\^15\)": lambda x: ops.lattice_copies(x, 1.0, stream=2**15, step=1.0),
    "image_ids": lambda x: ops.lattice_copies(x, 1.0, image_ids=torch.tensor([0]), step=1.0),
    "float32, bfloat16": lambda x: ops.lattice_copies(x.double(), 1.0, step=1.0),
    "dtype": lambda x: ops.lattice_copies(x, 1.0, dtype=torch.float64, step=1.0),
    "memory_format": lambda x: ops.lattice_copies(x, 1.0, memory_format=torch.channels_last_3d, step=1.0),
    "channels_last needs": lambda x: ops.lattice_copies(x[0], 1.0, memory_format=torch.channels_last, step=1.0),
    "out must be": lambda x: ops.lattice_copies(x, 1.0, out=torch.empty(1, 3, 4, 4), step=1.0),
    "out must be contiguous": lambda x: ops.lattice_copies(x, 1.0, out=torch.empty(2, 3, 4, 8)[..., ::2], step=1.0),
    "sigma must be positive": lambda x: ops.lattice_step(0.0),
    "step must be positive and finite": lambda x: ops.lattice_step(1.0, float("nan")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](torch.zeros(2, 3, 4, 4))


def test_nothing_in_nothing_out():
    for x, shape in ((torch.rand(0, 3, 4, 4), (0, 3, 4, 4)), (torch.rand(2, 0), (10, 0))):
        y, voids = ops.lattice_copies(x, 1.0, 5, step=STEP)
        assert y.shape == shape and voids.shape == shape[:1] and not voids.any()
