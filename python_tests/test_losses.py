"""Losses against their formulas, with first and second derivatives; the soft operators; defaults per data set."""

from __future__ import annotations

import pytest
import torch
from test_training import small_data
from torch import Tensor, nn

from pacd_fast import ops
from pacd_fast.ops import reference
from pacd_fast.randomness import Stream
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, hyperparameters, loss_of


class Smooth64(nn.Module):
    """A small network in float64 behind float32 images, smooth, so that second derivatives are there to compare."""

    def __init__(self, classes: int = 4, scale: float = 3.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, classes)
        self.double()
        with torch.no_grad():
            self.second.weight *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.double().flatten(1))))


def noise_of(x: Tensor, sigma: float, k: int, seed: int) -> Tensor:
    """What is added to every copy, [B, k, ...], exactly, in float64."""
    noisy = ops.noisy_copies(x, sigma, k, seed, stream=Stream.TRAINING).double()
    return noisy.view(len(x), k, *x.shape[1:]) - x.double().unsqueeze(1)


def plain(loss, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Every loss written out."""
    if isinstance(loss, Standard):
        return nn.functional.cross_entropy(model(x), y)
    noise = noise_of(x.detach(), loss.sigma, loss.k, seed)
    if isinstance(loss, SmoothAdv):
        x = x + reference.pgd(model, x.detach().double(), y, noise, loss.epsilon, loss.steps)
        noise = noise_of(x.detach().float(), loss.sigma, loss.k, seed)
    copies = (x.double().unsqueeze(1) + noise).flatten(0, 1)
    if isinstance(loss, Macer):
        logits = model(copies).view(len(x), loss.k, -1)
        numbers = {name: getattr(loss, name) for name in ("sigma", "beta", "gamma", "lam")}
        return reference.macer(logits, y, **numbers)
    return nn.functional.cross_entropy(model(copies), y.repeat_interleave(loss.k))


def derivatives(value: Tensor, weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with respect to weights and x, and those of <gradient, fixed direction>: the Hessian's rows there."""
    first = list(torch.autograd.grad(value, [*weights, x], create_graph=True))
    directions = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape) for g in first]
    along = sum((g * d).sum().double() for g, d in zip(first, directions, strict=True))
    return first, list(torch.autograd.grad(along, [*weights, x]))


LOSSES = [
    Standard(),
    Gaussian(0.5),
    Gaussian(0.25, 3),
    Macer(0.5, k=4, beta=2.0, lam=3.0),
    Macer(0.25, k=16, gamma=2.0),
    SmoothAdv(0.25, 0.5, k=1),
    SmoothAdv(0.5, 1.0, steps=4, k=3),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_loss_is_its_formula_with_two_derivatives(loss):
    model, (x, y) = Smooth64(), small_data(12)
    x = (0.4 * x + 0.3).requires_grad_()
    if isinstance(loss, Macer):  # all kinds: wrong, right and inside the hinge, right and beyond it
        logits = model(ops.noisy_copies(x, loss.sigma, loss.k, 5, stream=Stream.TRAINING)).view(12, loss.k, -1)
        y[:8] = ops.soft_smooth(logits, loss.beta).argmax(1)[:8]
        radius = ops.soft_radius(logits, y, beta=loss.beta, sigma=loss.sigma, squeeze=0.0)
        inside = (radius > 0) & (radius <= loss.gamma * loss.sigma / 2)
        assert bool(inside.any()) and bool((radius == 0).any())
    weights = list(model.parameters())
    ours, theirs = loss(model, x, y, seed=5), plain(loss, model, x, y, seed=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # x in float32, all else in float64
    for mine, other in zip(derivatives(ours, weights, x), derivatives(theirs, weights, x), strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
            assert bool((b != 0).any())


def test_macers_second_derivatives_are_finite_where_the_network_is_certain():
    """Beyond the hinge the radius is infinite in float32, its slopes overflow, and the loss must not see them."""
    for scale in (1.0, 3.0, 10.0, 30.0, 100.0):
        logits = (scale * torch.eye(4)).repeat_interleave(2, 0).requires_grad_()
        loss = Macer(0.5, k=2, lam=1.0)(lambda x, z=logits: z, torch.zeros(4, 1, 4, 4), torch.arange(4), seed=0)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        (bent,) = torch.autograd.grad(slope.square().sum() + slope[0, 0], logits)
        assert bool(torch.isfinite(slope).all()) and bool(torch.isfinite(bent).all())


def test_macers_hinge_counts_where_it_is_documented_to():
    """Wrong, right within gamma sigma / 2, and right beyond it: the hinge is there for the second alone."""
    sigma, gamma = 0.5, 2.0
    gaps = torch.tensor([-1.0, 0.2, 1.0, 6.0], dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros(4)], 1).repeat_interleave(2, 0)
    y = torch.zeros(4, dtype=torch.int64)
    p = torch.sigmoid(gaps)
    radius = sigma * torch.special.ndtri(p)  # sigma / 2 (Phi^-1(p) - Phi^-1(1 - p))
    widest = gamma * sigma / 2
    assert (radius > 0).tolist() == [False, True, True, True] and (radius > widest).tolist() == [False] * 3 + [True]
    hinge = torch.tensor([0.0, float(widest - radius[1]), float(widest - radius[2]), 0.0])
    loss = Macer(sigma, k=2, beta=1.0, gamma=gamma, lam=3.0)
    found = loss.of_logits(logits, y)
    torch.testing.assert_close(found, (3 * hinge - p.log()).mean(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_loss_depends_on_its_seed_alone(loss):
    model, (x, y) = Smooth64(), small_data(6)
    torch.manual_seed(3)
    first = loss(model, x, y, seed=11)
    torch.manual_seed(4)
    assert torch.equal(first, loss(model, x, y, seed=11))
    assert isinstance(loss, Standard) or not torch.equal(first, loss(model, x, y, seed=12))


def test_smoothadv_stays_in_the_ball_and_leaves_the_mode_alone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
    network[2].eval()  # a part that its owner froze
    x, y = small_data(10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for epsilon in (0.0, 0.3, 2.0):
        delta = SmoothAdv(0.25, epsilon, steps=5, k=2).perturbation(network, x, y, seed=0)
        assert float(delta.flatten(1).norm(dim=1).max()) <= epsilon * (1 + 1e-6)
        assert float((x + delta).min()) >= -1e-6 and float((x + delta).max()) <= 1 + 1e-6 and not delta.requires_grad
    assert network.training and network[0].training and not network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        assert float(SmoothAdv(0.25, 1.0)(network, x, y, seed=0)) > float(Gaussian(0.25)(network, x, y, seed=0))
    schedule = SmoothAdv(0.25, 2.0, warmup=4)
    assert [schedule.at_epoch(e).epsilon for e in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_smoothadv_attacks_the_network_in_eval_mode():
    """Batch norm that is being trained: the perturbation is that of its running statistics, and leaves no trace."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
    x, y = small_data(10)
    network(3 * x + 1)  # running statistics that are not those of a batch
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loss = SmoothAdv(0.25, 0.5, steps=3, k=2)
    training = loss.perturbation(network, x, y, seed=0)
    assert network.training and network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(training, loss.perturbation(network.eval(), x, y, seed=0))
    assert not any(module.training for module in network.modules())
    assert float(training.abs().max()) > 0.01


@pytest.mark.parametrize("squeeze", [0.001, 0.0])
def test_soft_operators_have_exact_derivatives(squeeze):
    for shape in ((4, 3, 5), (2, 17, 3)):
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = ops.soft_smooth(logits, 2.0).argmax(1)
        y[0] = (y[0] + 1) % shape[2]
        for function in (
            lambda a: ops.soft_smooth(a, 2.0),
            lambda a, y=y: ops.soft_radius(a, y, beta=2.0, sigma=0.5, squeeze=squeeze),
        ):
            assert torch.autograd.gradcheck(function, logits)
            assert torch.autograd.gradgradcheck(function, logits)


def test_soft_operators_at_the_edges():
    logits = torch.zeros(5, 2, 3)
    logits[1, 0, 2] = torch.nan
    logits[2, :, 0] = 1e4  # saturated: 1 - p underflows
    logits[3, :, 1] = torch.inf
    logits[4] = -1e30
    logits.requires_grad_()
    p = ops.soft_smooth(logits, 16.0)
    assert p[1].isnan().all() and p[3].isnan().all() and torch.equal(p[2], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(p[4], torch.full((3,), 1 / 3).to(p.dtype)) or bool((p[4] - 1 / 3).abs().max() < 1e-7)
    y = torch.zeros(5, dtype=torch.int64)
    radius = ops.soft_radius(logits, y, beta=16.0, sigma=0.5, squeeze=0.0)
    assert radius[0] == 0 and radius[1].isnan() and radius[2] == torch.inf and radius[3].isnan() and radius[4] == 0
    (slope,) = torch.autograd.grad(radius[2], logits)
    assert bool((slope[[0, 2, 4]] == 0).all())
    half = ops.soft_radius(torch.randn(3, 2, 4).bfloat16(), torch.zeros(3, dtype=torch.int64), beta=1.0, sigma=1.0)
    assert half.dtype == torch.float32


def test_a_sure_network_is_attacked_all_the_same():
    """Gradients of 1e-25, whose squares underflow in float32, are a direction like any other."""
    x = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.tensor([1e-25, -2e-25, 0.0, 2e-25]).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    delta = SmoothAdv.step(x, torch.zeros_like(x), slope, torch.full((2,), 0.3), 2)
    torch.testing.assert_close(delta.flatten(1), torch.tensor([[0.1, -0.2, 0.0, 0.2]] * 2))


def test_defaults_per_data_set():
    assert loss_of("macer", "mnist", {"sigma": 0.25}) == Macer(0.25, k=16, beta=16.0, gamma=8.0, lam=16.0)
    assert loss_of("macer", "cifar10", {"sigma": 0.25}) == Macer(0.25, lam=12.0)
    assert loss_of("macer", "cifar10", {"sigma": 0.5}) == Macer(0.5, lam=4.0)
    assert loss_of("macer", "cifar10", {"sigma": 0.5, "lam": 2.0}) == Macer(0.5, lam=2.0)
    assert loss_of("smoothadv", "mnist", {}) == SmoothAdv(0.5, 1.0, steps=2, k=1)
    assert set(hyperparameters()) == {"sigma", "k", "beta", "gamma", "lam", "epsilon", "steps", "warmup"}


def test_one_copy_has_a_slope_however_wrong_the_network_is():
    """The mean of several copies' softmax ends at 1e-20; one copy's cross-entropy goes on, and so does the attack."""

    def network(x: Tensor) -> Tensor:
        return torch.stack([4000 * x.flatten(1)[:, 0], torch.zeros(len(x))], 1)

    x, y = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, dtype=torch.int64)
    for k, norm in ((1, 0.25), (2, 0.0)):
        delta = SmoothAdv(0.01, 0.25, k=k).perturbation(network, x, y, seed=1)
        assert delta.flatten(1).norm(dim=1).tolist() == pytest.approx([norm] * 2)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_smoothadvs_radius_grows_over_its_warmup(warmup):
    loss = SmoothAdv(0.5, 1.0, warmup=warmup)
    radii = [loss.at_epoch(epoch).epsilon for epoch in range(5)]
    assert radii == [min(1.0, (epoch + 1) / max(warmup, 1)) for epoch in range(5)] and radii[4] == 1.0
    with pytest.raises(ValueError, match="k must be at least 1"):
        SmoothAdv(0.5, 1.0, k=0)


def test_smoothadv_stays_where_there_is_no_slope():
    x, radius = torch.rand(2, 1, 4, 4), torch.tensor(0.5)
    moved = SmoothAdv.step(x, torch.zeros_like(x), torch.zeros_like(x), radius, 2)
    assert torch.equal(moved, torch.zeros_like(x))
