"""The soft smoothed classifier: bounds, coverage, invariance, bad input, derivatives of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
from test_training import small_network
from torch import Tensor, nn

import pacd_fast
from pacd_fast import _C, ops
from pacd_fast.certification.soft import UNIT, bernstein_lower
from pacd_fast.ops import reference


def test_the_kernels_functions_have_the_errors_that_they_state():
    mp.mp.prec = 120
    xs = [-(10.0**e) * f for e in range(-9, 3) for f in (1.0, 1.7, 3.3, 6.9)] + [-0.0, -86.9, -707.9]
    for x in xs:
        if x >= -708:
            assert abs(_C.soft_exp(x) / mp.exp(x) - 1) < 1e-15, x
        x = float(np.float32(x))
        if x >= -87:
            assert abs(_C.soft_exp_float(x) / mp.exp(x) - 1) < 3e-7, x
    assert _C.soft_exp(-708.1) == 0 == _C.soft_exp_float(-87.1) == _C.soft_exp(-math.inf)
    assert math.isnan(_C.soft_exp(math.nan)) and math.isnan(_C.soft_exp_float(math.nan))
    for tail in [10.0**-e * f for e in range(1, 300, 7) for f in (0.7, 1.0, 3.1)] + [0.0749, 0.0751, 0.45]:
        z = _C.quick_quantile(tail, 1 - tail)
        # the error of z through Phi, whose relative slope is the hazard rate, about |z| + 1 / |z|
        off = abs(mp.ncdf(z) / mp.mpf(tail) - 1) / (abs(z) + 1 / abs(z)) / abs(z)
        assert off < 2e-15 and _C.quick_quantile(1 - tail, tail) == -z, tail
    assert _C.quick_quantile(0.0, 1.0) == -math.inf and _C.quick_quantile(1.0, 0.0) == math.inf


def test_bernstein_is_its_formula_and_a_lower_bound():
    generator = np.random.default_rng(0)
    misses = 0
    for trial in range(400):
        units = (generator.beta(2, 1, 200) * UNIT).astype(np.int64)
        bound = bernstein_lower(int(units.sum()), int((units * units).sum()), 200, 0.1)
        if trial < 20:
            assert bound == pytest.approx(reference.bernstein_lower(units / UNIT, 0.1), abs=1e-12)
        misses += bound > 2 / 3
    assert misses <= 400 * 0.1  # it is far from tight: in truth none is expected
    assert bernstein_lower(1000 * UNIT, 1000 * UNIT**2, 1000, 0.001) == pytest.approx(1 - 7 * math.log(2000) / 3 / 999)
    with pytest.raises(ValueError, match="n must be at least 2"):
        bernstein_lower(1, 1, 1, 0.1)


def certify(network: nn.Module, x: Tensor, **options) -> pacd_fast.SoftCertificates:
    return pacd_fast.soft_certify(network, x, num_classes=4, **({"sigma": 0.25, "n": 600, "seed": 1} | options))


def test_soft_certificates_do_not_depend_on_batches_and_agree_with_the_plain_sum():
    network, x = small_network(), torch.rand(5, 1, 4, 4)
    with torch.no_grad():
        network[3].weight *= 20
    found, other = certify(network, x, beta=4.0), certify(network, x, beta=4.0, batch_size=64)
    for name in ("prediction", "radius", "p_lower", "mean"):
        assert torch.equal(getattr(found, name), getattr(other, name))
    alone = certify(network, x[3:4], beta=4.0, image_ids=torch.tensor([3]))
    assert torch.equal(alone.mean[0], found.mean[3])
    with torch.no_grad():
        noisy, _ = pacd_fast.ops.lattice_copies(
            x[3:4], 0.25, 600, 1, step=1 / 255, image_ids=torch.tensor([3]), stream=1
        )
        mean = torch.softmax(4.0 * network(noisy), 1).double().mean(0)
    torch.testing.assert_close(found.mean[3], mean, rtol=0, atol=3e-6)
    inside = found.prediction >= 0
    assert bool(inside.any()) and torch.equal(inside, found.p_lower > 0.5) and bool((found.radius[~inside] == 0).all())
    z = torch.special.ndtri(found.p_lower[inside])
    torch.testing.assert_close(found.radius[inside], 0.25 * z, rtol=1e-12, atol=0)


def test_soft_certify_refuses():
    network, x = small_network(), torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="it takes n = 37"):
        certify(network, x, n=36)
    assert int(certify(network, x, n=37).prediction[0]) in (-1, 0, 1, 2, 3)
    for options in ({"beta": 0.0}, {"alpha": 1.0}, {"n": 2**23}, {"n0": 0}, {"seed": -1}):
        with pytest.raises(ValueError):
            certify(network, x, **options)
    with torch.no_grad():
        network[3].bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN for 700 of 700 noisy copies of image 0"):
        certify(network, x)


def test_soft_operators_in_forward_mode_and_under_torch_func():
    logits, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    logits[0] *= 1e4  # Phi^-1 is infinite there without squeeze
    v = torch.randn_like(logits)
    for squeeze in (0.001, 0.0):
        numbers = {"beta": 2.0, "sigma": 0.5, "squeeze": squeeze}
        for run in (lambda z: ops.soft_smooth(z, 2.0), lambda z, n=numbers: ops.soft_radius(z, y, **n)):
            value, tangent = torch.func.jvp(run, (logits,), (v,))
            torch.testing.assert_close(value, run(logits))
            leaf = logits.clone().requires_grad_()
            weights = torch.ones_like(run(leaf), requires_grad=True)
            (slope,) = torch.autograd.grad(run(leaf), leaf, weights, create_graph=True)
            torch.testing.assert_close(tangent, torch.autograd.grad(slope, weights, v)[0])
            torch.testing.assert_close(torch.func.grad(lambda z, run=run: run(z).sum())(logits), slope.detach())
            with torch.autograd.forward_ad.dual_level():
                dual = run(torch.autograd.forward_ad.make_dual(logits, v))
                torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


def third(run: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    z = logits.clone().requires_grad_()
    value = run(z).square().sum()
    for _ in range(3):
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        value = (slope * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).sum()
    return slope.detach()


def test_soft_operators_have_third_derivatives():
    logits, y = torch.randn(4, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    numbers = {"beta": 2.0, "sigma": 0.5}
    for ours, plain in (
        (lambda z: ops.soft_smooth(z, 2.0), lambda z: reference.soft_smooth(z, 2.0)),
        (lambda z: ops.soft_radius(z, y, **numbers), lambda z: reference.soft_radius(z, y, **numbers)),
    ):
        torch.testing.assert_close(third(ours, logits), third(plain, logits), rtol=1e-9, atol=1e-12)
