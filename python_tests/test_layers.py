"""layers.py against torch's operators: values and all derivatives.  The pooling is in test_ops.py."""

import pytest
import torch
from torch import nn

from pacd_fast import layers


def test_the_gradient_has_the_same_bits_on_any_number_of_threads():
    layer, x = nn.Conv2d(1, 20, 5), torch.rand(9, 1, 28, 28).requires_grad_()
    y = layers.convolution(layer, x)
    slope = torch.randn_like(y)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(y, x, slope, retain_graph=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_of_one_channel(size, dtype, bias):
    layer = nn.Conv2d(1, 6, size, bias=bias).to(dtype)
    layer.to(memory_format=torch.channels_last)
    x = torch.rand(3, 1, 11, 13).to(dtype).requires_grad_()
    y = layers.convolution(layer, x)
    assert (type(y.grad_fn).__name__ == "_NarrowBackward") == (size != 2 and dtype != torch.float64)
    expected = layer(x)
    assert torch.equal(y, expected)
    slope = torch.randn_like(y)
    leaves = (x, *layer.parameters())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    found, theirs = torch.autograd.grad(y, leaves, slope), torch.autograd.grad(expected, leaves, slope)
    for a, b in zip(found, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 1}, {"padding": "same"}, {"dilation": 2}, {"padding": 2, "padding_mode": "circular"}],
    ids=str,
)
def test_other_convolutions_are_torchs(options):
    layer, x = nn.Conv2d(1, 4, 3, **options), torch.rand(2, 1, 9, 8).requires_grad_()
    y, expected = layers.convolution(layer, x), layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(expected.square().sum(), x)[0])


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_is_more_than_a_convolution_is_called():
    x, seen = torch.rand(2, 1, 9, 8).requires_grad_(), []
    watched = nn.Conv2d(1, 4, 3)
    watched.register_forward_hook(lambda *_: seen.append(1))
    layers.convolution(watched, x)
    assert seen
    doubled, halved = Doubled(1, 4, 3), nn.utils.parametrize.register_parametrization
    assert torch.equal(layers.convolution(doubled, x), doubled(x))
    parametrized = nn.Conv2d(1, 4, 3)
    halved(parametrized, "weight", nn.Tanh())
    assert torch.equal(layers.convolution(parametrized, x), parametrized(x))
    with torch.autocast("cpu", torch.bfloat16):
        double = nn.Conv2d(1, 4, 3).double()
        assert layers.convolution(double, x.double()).dtype == double(x.double()).dtype


def test_convolution_of_one_channel_has_all_derivatives():
    layer, x = nn.Conv2d(1, 4, 3), torch.rand(2, 1, 6, 5).requires_grad_()
    v = torch.randn(2, 1, 6, 5)
    results = []
    for run in (lambda x: layers.convolution(layer, x), layer):
        (slope,) = torch.autograd.grad(run(x).square().sin().sum(), x, create_graph=True)
        second = torch.autograd.grad((slope * v).sum(), (x, *layer.parameters()))
        forward = torch.func.jvp(lambda x, run=run: run(x).sin(), (x.detach(),), (v,))
        batched = torch.autograd.grad(
            run(x), x, torch.stack([run(x).detach(), run(x).detach() ** 2]), is_grads_batched=True
        )
        results.append((slope, *second, *forward, *batched))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_convolution_of_one_channel_under_autocast():
    layer, x = nn.Conv2d(1, 4, 5), torch.rand(2, 1, 9, 9).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layers.convolution(layer, x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16 and torch.equal(y, expected)
    (found, weight), (theirs, other) = (torch.autograd.grad(z.sum(), (x, layer.weight)) for z in (y, expected))
    torch.testing.assert_close(found, theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight, other, rtol=2e-2, atol=2e-2)


def test_the_operator_keeps_to_its_schema():
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = (x, torch.ones(16, 1, 3, 3), 6, 6)
    torch.library.opcheck(torch.ops.pacd_fast.narrow_grad, arguments, test_utils="test_schema")
