"""The base classifier is one fixed function: of one shape, whatever is around it, compiled or not."""

import pytest
import torch
from torch import Tensor, nn

import pacd_fast
from pacd_fast.certification import BaseClassifier
from pacd_fast.networks import ConvNet

OPTIONS = {"num_classes": 3, "sigma": 0.25, "n": 500, "seed": 1}


class Counted(nn.Module):
    """A small network that notes the shapes and dtypes it is given."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        nn.init.uniform_(self.norm.running_mean)
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append((tuple(x.shape), x.dtype))
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def network() -> Counted:
    torch.manual_seed(0)
    return Counted()


@pytest.mark.parametrize("batch_size", [1, 37, 64, 300])
def test_the_given_batch_size_is_honoured_exactly(network, batch_size):
    shapes = set()

    def watched(x: Tensor) -> Tensor:
        shapes.add(tuple(x.shape))
        return network.eval()(x)

    pacd_fast.certify(watched, torch.rand(2, 1, 8, 8), batch_size=batch_size, **(OPTIONS | {"n": 50}))
    assert shapes == {(batch_size, 1, 8, 8)}


def test_autocast_around_it_has_no_effect(network):
    x = torch.rand(2, 1, 8, 8)
    plain = pacd_fast.certify(network, x, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pacd_fast.certify(network, x, **OPTIONS).counts, plain.counts)


def test_the_callers_module_is_left_alone(network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pacd_fast.certify(network, torch.rand(1, 1, 8, 8), dtype=torch.bfloat16, **OPTIONS)
    assert network.training and isinstance(network.norm, nn.BatchNorm2d) and next(network.parameters()).requires_grad
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_smooth_sees_weights_that_change(network):
    """The prepared copy is used again while nothing changed, and never after something did."""
    x = torch.rand(1, 8, 8)
    smooth = pacd_fast.Smooth(network, 3, 0.25, seed=1)
    smooth.predict(x, 100, 0.01)
    first = smooth._prepared[2]
    smooth.predict(x, 100, 0.01)
    assert smooth._prepared[2] is first
    with torch.no_grad():
        network.head.bias.data += torch.tensor([0.0, 1e6, 0.0])  # .data: no version is counted up
    assert smooth.predict(x, 100, 0.01) == 1 and smooth._prepared[2] is not first


def test_rows_are_chosen_once_and_remembered(network, monkeypatch):
    from pacd_fast.certification import classifier

    monkeypatch.setattr(classifier, "_chosen", {})
    x, tried = torch.rand(1, 1, 8, 8), []
    monkeypatch.setattr(
        BaseClassifier, "_seconds", lambda self, rows: tried.append(rows) or (1.0 if rows != 256 else 0.1)
    )
    assert BaseClassifier(network, x, 3, samples=10**7, compile=False).engine.rows == 256
    assert tried == [128, 256, 512]
    assert BaseClassifier(network, x, 3, samples=10**7, compile=False).engine.rows == 256 and tried[3:] == [256]
    assert BaseClassifier(network, x, 3, samples=10**7, compile=False, rows=77).engine.rows == 77


def test_rows_that_do_not_fit_into_memory_are_not_chosen(network, monkeypatch):
    """Larger batches are tried until one does not fit; what does not fit at its smallest is an error."""
    from pacd_fast.certification import classifier

    room = [0]

    def seconds(self, rows):
        if rows > room[0]:
            raise torch.OutOfMemoryError("out of memory")
        return 1.0  # the larger the batch, the less a row takes

    monkeypatch.setattr(BaseClassifier, "_seconds", seconds)
    for room[0], chosen in ((300, 256), (128, 128), (10**6, 512)):
        monkeypatch.setattr(classifier, "_chosen", {})
        assert BaseClassifier(network, torch.rand(1, 1, 8, 8), 3, samples=10**7, compile=False).engine.rows == chosen
    monkeypatch.setattr(classifier, "_chosen", {})
    room[0] = 100
    with pytest.raises(torch.OutOfMemoryError):
        BaseClassifier(network, torch.rand(1, 1, 8, 8), 3, samples=10**7, compile=False)


def test_auto_compiles_where_it_pays(network, monkeypatch):
    compiled = []
    monkeypatch.setattr(BaseClassifier, "_seconds", lambda self, rows: 0.01)
    monkeypatch.setattr(BaseClassifier, "_noise", lambda self, rows: self.empty(rows))
    from pacd_fast.certification import classifier

    monkeypatch.setattr(classifier, "_compiled", lambda model, mode: compiled.append(mode) or model)
    for samples, expected in ((1000, []), (256 * 100 * 10, []), (256 * 100 * 200, [None])):
        compiled.clear()
        found = BaseClassifier(network, torch.rand(1, 1, 8, 8), 3, samples=samples, rows=256)
        assert compiled == expected and found.engine.compiled == bool(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_compiled_votes_are_the_eager_ones(channels):
    torch.manual_seed(0)
    network, x = ConvNet(3, channels, (8, 8)), torch.rand(2, channels, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        eager, compiled = (
            pacd_fast.certify(network, x, dtype=dtype, compile=way, batch_size=64, **OPTIONS) for way in (False, True)
        )
        assert int((eager.counts - compiled.counts).abs().sum()) <= (4 if dtype == torch.float32 else 40)


def test_a_compiled_module_is_taken_as_it_is(network):
    x, calls = torch.rand(1, 1, 8, 8), []

    def backend(graph, example):
        def run(*inputs):
            calls.append(inputs[-1].shape)
            return graph(*inputs)

        return run

    taken = torch.compile(network.eval(), backend=backend, dynamic=False)
    plain = pacd_fast.certify(network, x, compile=False, batch_size=64, **OPTIONS)
    found = pacd_fast.certify(taken, x, batch_size=64, **OPTIONS)
    assert calls and int((plain.counts - found.counts).abs().sum()) <= 4
    network.train()
    with pytest.raises(ValueError, match="give it in eval mode"):
        pacd_fast.certify(taken, x, **OPTIONS)
    with pytest.raises(ValueError, match="in torch.bfloat16"):
        pacd_fast.certify(torch.compile(network.eval()), x, dtype=torch.bfloat16, **OPTIONS)


class Broken(Counted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y + 1


def test_graph_breaks_are_said():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="broke the model's graph"):
        pacd_fast.certify(Broken(), torch.rand(1, 1, 8, 8), compile=True, batch_size=64, **OPTIONS)


def test_no_compiler_is_a_clear_line(network, monkeypatch):
    def missing(model, mode):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    from pacd_fast.certification import classifier

    monkeypatch.setattr(classifier, "_compiled", missing)
    with pytest.raises(ValueError, match=r"cannot be compiled here \(InvalidCxxCompiler: No working") as caught:
        pacd_fast.certify(network, torch.rand(1, 1, 8, 8), compile=True, **OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_logits_of_another_dtype_lose_no_order(dtype):
    """float64 logits whose order float32 would lose, and whole numbers."""
    base = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64) * (1 if dtype == torch.float64 else 3)
    logits = base if dtype == torch.float64 else torch.tensor([2**40, 2**40 + 1, 2**40])
    found = pacd_fast.certify(lambda x: logits.expand(len(x), 3), torch.zeros(1, 2), **OPTIONS)
    assert found.counts.tolist() == [[0, 500, 0]]
    with pytest.raises(ValueError, match="real logits"):
        pacd_fast.certify(lambda x: logits.expand(len(x), 3) * 1j, torch.zeros(1, 2), **OPTIONS)


def test_images_of_any_kind(network):
    bytes_ = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    expected = pacd_fast.certify(network, bytes_ / 255, **OPTIONS)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(bytes_ / 255, torch.zeros(3).long()), batch_size=2
    )
    for images in (bytes_, bytes_.numpy(), (bytes_ / 255).numpy(), loader, torch.utils.data.DataLoader(bytes_ / 255)):
        found = pacd_fast.certify(network, images, **(OPTIONS | {"n": 5e2}))
        assert torch.equal(found.counts, expected.counts)
    for wrong in (bytes_.long(), 5, "images"):
        with pytest.raises(ValueError, match="images"):
            pacd_fast.certify(network, wrong, **OPTIONS)
    sigmas = torch.tensor([0.25, 0.5, 0.25])
    many = pacd_fast.certify(network, bytes_, **(OPTIONS | {"sigma": sigmas}))
    assert torch.equal(many.counts[[0, 2]], expected.counts[[0, 2]])
    alone = pacd_fast.certify(network, bytes_[1:2], image_ids=torch.tensor([1]), **(OPTIONS | {"sigma": 0.5}))
    assert torch.equal(many.counts[1], alone.counts[0]) and many.radius[1] == alone.radius[0]
    for levels in (sigmas.numpy(), sigmas.tolist()):
        assert torch.equal(pacd_fast.certify(network, bytes_, **(OPTIONS | {"sigma": levels})).counts, many.counts)
        close, x = (lambda x: x[:, :3] - 0.2 * x[:, 3:]), torch.tensor([[0.3, 0.1, 0, 0]] * 3)
        predicted = pacd_fast.predict(close, x, **(OPTIONS | {"sigma": levels}))
        for i, sigma in enumerate(levels):
            alone = pacd_fast.predict(
                close, x[i : i + 1], image_ids=torch.tensor([i]), **(OPTIONS | {"sigma": float(sigma)})
            )
            assert torch.equal(predicted.counts[i], alone.counts[0]) and predicted.samples[i] == alone.samples[0]
        assert len(predicted.counts.unique(dim=0)) == 3
    with pytest.raises(ValueError, match=r"one per image"):
        pacd_fast.certify(network, bytes_, **(OPTIONS | {"sigma": torch.ones(2)}))


def test_images_that_do_not_fit_are_said_to(network):
    three = torch.rand(2, 3, 8, 8)
    for call in (pacd_fast.certify, pacd_fast.predict, pacd_fast.soft_certify):
        with pytest.raises(ValueError, match=r"the model does not take images \(3, 8, 8\): ") as caught:
            call(network, three, **OPTIONS)
        assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="the images reach 255, and sigma is 0.25 in the same unit: give images of 8"):
        pacd_fast.certify(network, torch.full((1, 1, 8, 8), 255.0), **OPTIONS)


def test_a_smoothed_classifier_takes_arrays(network):
    image = torch.rand(1, 8, 8)
    found = []
    for given in (image, image.numpy()):
        smooth = pacd_fast.Smooth(network, 3, 0.25, seed=3)
        found.append((smooth.certify(given, 20, 500, 0.001), smooth.predict(given, 500, 0.001)))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="x must be a tensor or a NumPy array, not list"):
        smooth.certify([0.5], 20, 500, 0.001)
