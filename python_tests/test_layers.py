"""layers.py against torch's operators: values and all derivatives.  The pooling is in test_ops.py."""

import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pacd_fast.networks import build, layers


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
    assert (type(y.grad_fn).__name__ == "_QuickBackward") == (size != 2 and dtype != torch.float64)
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


def test_convolution_of_one_channel_under_autocast():
    layer, x = nn.Conv2d(1, 4, 5), torch.rand(2, 1, 9, 9).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layers.convolution(layer, x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16 and torch.equal(y, expected)
    (found, weight), (theirs, other) = (torch.autograd.grad(z.sum(), (x, layer.weight)) for z in (y, expected))
    torch.testing.assert_close(found, theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [(1, 1), (2, 33), (5, 7), (8, 8), (9, 10), (16, 16)], ids=str)
@pytest.mark.parametrize("channels", [(16, 16), (16, 48), (64, 32)], ids=str)
def test_padded_convolution(size, channels):
    inputs, outputs = channels
    x, slope = torch.randn(3, inputs, *size), torch.randn(3, outputs, *size)
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)
    run = torch.ops.pacd_fast.convolve3x3
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    back = nn.functional.conv_transpose2d(slope.double(), weight.double(), padding=1)
    for found, right in ((run(x, weight, bias, False), expected), (run(slope, weight, None, True), back)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-6 * 3 * max(channels) ** 0.5)
    alone = torch.cat([run(image[None], weight, bias, False) for image in x])
    assert torch.equal(alone, run(x.contiguous(memory_format=torch.channels_last), weight, bias, False))


needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="padded convolutions are torch's without AVX-512"
)


def padded_case(bias=True, size=8):
    layer = nn.Conv2d(16, 32, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    return layer, torch.randn(2, 16, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()


@needs_avx512
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_padded_convolution_as_a_layer(bias, frozen):
    layer, x = padded_case(bias)
    layer.requires_grad_(not frozen)
    y, expected = layers.convolution(layer, x), layer(x)
    assert type(y.grad_fn).__name__ == "_QuickBackward" and not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = (x, *(p for p in layer.parameters() if p.requires_grad))
    slope = torch.randn_like(y)
    found, theirs = torch.autograd.grad(y, leaves, slope), torch.autograd.grad(expected, leaves, slope)
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    with torch.no_grad():
        assert torch.equal(layers.convolution(layer, x), y)


class Seen(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def narrow_case():
    return nn.Conv2d(1, 4, 3), torch.rand(2, 1, 9, 9).requires_grad_()


both_kinds = pytest.mark.parametrize("case", [narrow_case, pytest.param(padded_case, marks=needs_avx512)])


@both_kinds
def test_no_gradient_of_weights_where_none_is_asked_for(case):
    layer, x = case()
    weight = "aten::convolution_backward"
    y = layers.convolution(layer, 2 * x)
    for wanted, expected in (([x], False), ([x, layer.weight], True), ([layer.weight], True), ([x, layer.bias], True)):
        with Seen() as seen:
            torch.autograd.grad(y.sum(), wanted, retain_graph=True)
        assert (weight in seen.names) == expected
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None


@both_kinds
def test_all_derivatives(case):
    layer, x = case()
    v, slope = torch.randn_like(x), torch.randn_like(layer(x)).detach()
    results = []
    for run in (lambda x: layers.convolution(layer, x), layer):
        (back,) = torch.autograd.grad(run(x).square().sin().sum(), x, create_graph=True)
        second = torch.autograd.grad((back * v).sum(), (x, *layer.parameters()))
        forward = torch.func.jvp(lambda x, run=run: run(x).sin(), (x.detach(),), (v,))
        batched = torch.autograd.grad(run(x), x, torch.stack([run(x).detach(), slope]), is_grads_batched=True)
        results.append((back, *second, *forward, *batched))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


@needs_avx512
def test_padded_convolution_of_a_gradient_with_a_tangent():
    layer, x = padded_case()
    slope, v = torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)
    tangents = []
    for run in (lambda x: layers.convolution(layer, x), layer):
        with torch.autograd.forward_ad.dual_level():
            (back,) = torch.autograd.grad(run(x), x, torch.autograd.forward_ad.make_dual(slope, v))
            tangents.append(torch.autograd.forward_ad.unpack_dual(back).tangent)
    torch.testing.assert_close(tangents[0], tangents[1], rtol=1e-5, atol=1e-4)


@needs_avx512
def test_padded_convolutions_that_are_torchs():
    layer, x = padded_case()
    last = {"memory_format": torch.channels_last}
    for changed in (x[:, :, :7].contiguous(**last), x.detach().contiguous(), x.double(), padded_case(size=16)[1][0]):
        given = layer.double() if changed.dtype == torch.float64 else layer.float()
        assert torch.equal(layers.convolution(given, changed), given(changed))
    layer.float()
    assert torch.equal(layers.conv2d(x, layer.weight, None), nn.functional.conv2d(x, layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layers.convolution(layer, x), layer(x))
    for other in (nn.Conv2d(16, 80, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)):
        assert torch.equal(layers.convolution(other, x), other(x))
    compiled = torch.compile(lambda x: layers.convolution(layer, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@needs_avx512
@pytest.mark.parametrize("change", ["channels", "bias of float64", "meta"])
def test_what_torch_refuses_is_refused_in_its_words(change):
    layer, x = padded_case()
    if change == "channels":
        x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    elif change == "bias of float64":
        layer.bias = nn.Parameter(layer.bias.double())
    else:
        layer.to("meta")
    messages = []
    for run in (lambda: layers.conv2d(x, layer.weight, layer.bias, (1, 1), (1, 1)), lambda: layer(x)):
        try:
            messages.append(str(run().device))
        except RuntimeError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]


@needs_avx512
def test_a_layer_that_is_watched_is_called():
    layer, x = padded_case()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda *_: seen.append("hook")):
        layers.convolution(layer, x)
    layer.forward = lambda x: seen.append("replaced")
    layers.convolution(layer, x)
    assert seen == ["hook", "replaced"]


@needs_avx512
def test_residual_networks_can_be_traced():
    network, x = (
        build("resnet20", num_classes=10, in_channels=3, image_size=(16, 16)).eval(),
        torch.rand(2, 3, 16, 16),
    )
    x = x.contiguous(memory_format=torch.channels_last)
    for traced in (torch.fx.symbolic_trace(network), torch.jit.trace(network, x)):
        torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-4)
    torch.jit.save(torch.jit.trace(network, x), io.BytesIO())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert network(fake.from_tensor(x)).shape == (2, 10)


def test_the_operators_keep_to_their_schemas_and_say_what_they_expect():
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = (x, torch.ones(16, 1, 3, 3), 6, 6)
    torch.library.opcheck(torch.ops.pacd_fast.narrow_grad, arguments, test_utils=("test_schema", "test_faketensor"))
    run, weight = torch.ops.pacd_fast.convolve3x3, torch.ones(32, 16, 3, 3)
    for case in ((x, weight, torch.ones(32), False), (torch.ones(2, 32, 5, 4), weight, None, True)):
        torch.library.opcheck(run, case, test_utils=("test_schema", "test_faketensor"))
    assert run(x[:0], weight, None, False).shape == (0, 32, 4, 4)
    for wrong in (
        (x.double(), weight, None),
        (x[:, :8], weight, None),
        (x, weight[:20], None),
        (x, weight, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="convolve3x3"):
            run(*wrong, False)
