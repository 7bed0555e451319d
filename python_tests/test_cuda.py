"""What only a card can show: bits of every operator, streams, graphs, the compiler, the ways through the package."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import CASES, different_bits, lowered
from played import compare
from torch import Tensor, nn

import pacd_fast
from pacd_fast import ops
from pacd_fast.certification import batch
from pacd_fast.certification.classifier import BaseClassifier
from pacd_fast.certification.noise import Noise
from pacd_fast.certification.sampler import _Report
from pacd_fast.certification.vote import sampler_of
from pacd_fast.data import Dataset
from pacd_fast.poisoning import Ball, MetaPoison, Pacd, Recipe, metapoison, pacd
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, fit

pytestmark = pytest.mark.cuda


@pytest.fixture(params=[0, 1])
def device(request) -> str:
    if request.param >= torch.cuda.device_count():
        pytest.skip("one card")
    return f"cuda:{request.param}"


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Without TF32: what differs from the CPU then is the order of sums."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on(device: str, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_cases_gives_the_bits_of_the_cpu(name, device):
    case = CASES[name]
    for args, options in case.arguments():
        there = case.run(*(on(device, a) for a in args), **{k: on(device, v) for k, v in options.items()})
        assert there.device == torch.device(device)
        assert different_bits(case.run(*args, **options), there) is None


@pytest.mark.parametrize("calls", [compare.edge_calls, compare.large_calls], ids=lambda calls: calls.__name__)
def test_sizes_about_a_warp_a_block_and_a_grid_give_the_bits_of_the_cpu(calls, device):
    for call in calls():
        assert compare.difference(call, torch.ops.pacd_fast, device) is None


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    for function, args in lowered(name):
        torch.library.opcheck(function, tuple(on("cuda", a) for a in args))


def test_out_is_filled_in_both_layouts():
    x = torch.rand(3, 3, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(12, 3, 32, 32, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
        ops.noisy_copies(x.cuda(), 0.5, 4, 3, out=out)
        assert torch.equal(out.cpu(), ops.noisy_copies(x, 0.5, 4, 3, dtype=torch.bfloat16))


def test_kernels_run_on_the_current_stream():
    x, stream = torch.rand(64, 3, 64, 64, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # so that another stream would be too early
        x = x * 2  # ordered before the noise only on this stream
        there = ops.noisy_copies(x, 1.0, 16, 5)
    stream.synchronize()
    assert torch.equal(there.cpu(), ops.noisy_copies(x.cpu(), 1.0, 16, 5))


def test_tensors_of_two_devices_are_refused():
    counts, logits = torch.zeros(2, 3, dtype=torch.int64, device="cuda"), torch.eye(3, device="cuda")
    with pytest.raises(RuntimeError, match="on one device"):
        torch.ops.pacd_fast.add_votes_(counts, logits, torch.zeros(3, dtype=torch.int64))


def test_a_row_of_no_image_reads_no_other_memory(device):
    assert compare.outside(torch.ops.pacd_fast, device) is None


def test_votes_for_no_image_are_left_out():
    counts = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    logits, index = torch.eye(3, device="cuda"), torch.tensor([0, 7, -1], device="cuda")
    assert int(ops.add_votes_(counts, logits, index).sum()) == 0
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0]]


def vote(x: Tensor, counts: Tensor, weight: Tensor, first: int) -> Tensor:
    noisy = ops.noisy_copies(x, 0.5, 4, 9, first=first)
    index = torch.arange(len(x), device=x.device).repeat_interleave(4)
    ops.add_votes_(counts, noisy.flatten(1).sign() @ weight, index)
    return ops.normal_quantile(counts.double() / 16)


def vote_arguments(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    weight = torch.randint(-8, 9, (16, 5)).float()  # whole numbers: the order of a sum is no matter
    return tuple(t.to(device) for t in (torch.rand(3, 1, 4, 4), torch.zeros(3, 5, dtype=torch.int64), weight))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_operators_compile_without_a_break(backend):
    (x, there, weight), (plain, here, plain_weight) = vote_arguments("cuda"), vote_arguments("cpu")
    compiled = torch.compile(vote, fullgraph=True, backend=backend)
    for first in (0, 4, 8):
        assert different_bits(vote(plain, here, plain_weight, first), compiled(x, there, weight, first)) is None
    assert torch.equal(there.cpu(), here) and int(here.sum()) == 36


def test_operators_are_captured_in_a_graph():
    (x, there, weight), (plain, here, plain_weight) = vote_arguments("cuda"), vote_arguments("cpu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        vote(x, there, weight, 0)  # cuBLAS takes its memory now
    torch.cuda.current_stream().wait_stream(stream)
    there.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = vote(x, there, weight, 0)
    assert int(there.sum()) == 0  # captured, not run
    for number in range(3):
        x.copy_(plain + number)
        graph.replay()
        assert different_bits(vote(plain + number, here, plain_weight, 0), found) is None
    assert torch.equal(there.cpu(), here) and int(here.sum()) == 36


# --- Each way through the package: the numbers of the CPU, but for the order of sums ---


def tiny(num_classes: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


def blobs() -> Dataset:
    """Three classes of 8 x 8 images in uint8: 90 to train, 30 to test, 30 to validate."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    centres = torch.randint(60, 196, (3, 1, 8, 8), generator=generator)
    images = (centres[labels] + torch.randint(-60, 60, (150, 1, 8, 8), generator=generator)).to(torch.uint8)
    parts = [(images[part], labels[part]) for part in (slice(90), slice(90, 120), slice(120, 150))]
    return Dataset("blobs", *parts[0], *parts[1], *parts[2], tuple("abc"))


@pytest.mark.parametrize(
    "loss", [Standard(), Gaussian(0.25, 2), Macer(0.25, k=2, lam=1.0), SmoothAdv(0.25, 0.25)], ids=str
)
def test_training(loss, device):
    data, weights = blobs(), {}
    for where in ("cpu", device):
        network = tiny(3).to(where)
        fit(network, (data.x_train, data.y_train), loss, epochs=2, batch_size=30, seed=1, optimizer="sgd", lr=0.01)
        weights[where] = torch.cat([p.detach().cpu().flatten() for p in network.parameters()])
    assert torch.isfinite(weights[device]).all()
    torch.testing.assert_close(weights[device], weights["cpu"], rtol=1e-3, atol=1e-4)


def test_hard_and_soft_certificates(device):
    x, network = torch.rand(4, 1, 8, 8), tiny(3)
    for certify in (pacd_fast.certify, pacd_fast.soft_certify):
        here, there = (
            certify(network.to(where), x.to(where), num_classes=3, sigma=0.5, n=5000, seed=5)
            for where in ("cpu", device)
        )
        assert torch.equal(there.prediction.cpu(), here.prediction)
        torch.testing.assert_close(there.radius.cpu(), here.radius, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["lattice", "float"])
def test_certificates_from_a_graph_are_the_eager_ones(kind, device, monkeypatch):
    """Bit for bit, of 9 images with room for 4 in the graph; it is captured once a run, and replayed."""
    x, network, replays = torch.rand(9, 1, 8, 8), tiny(3).to(device), []
    capture = batch.CAPTURES["cuda"]

    def counted(run, where):
        replay = capture(run, where)
        return lambda: (replays.append(where), replay())[1]

    def found() -> list[Tensor]:
        options = {"num_classes": 3, "sigma": 0.5, "seed": 5, "noise": kind, "batch_size": 256}
        hard = pacd_fast.certify(network, x, n=5000, **options)
        soft = pacd_fast.soft_certify(network, x, n=2000, **options)
        predicted = pacd_fast.predict(network, x, n=2000, n0=10, **options)
        return [hard.counts, hard.radius, hard.voids, soft.mean, soft.radius, predicted.counts, predicted.samples]

    monkeypatch.setattr(batch, "IMAGES", 4)
    monkeypatch.setitem(batch.CAPTURES, "cuda", counted)
    graphs = found()
    assert len(replays) > 9 * 2100 // 256  # soft certificates alone take so many
    monkeypatch.setattr(batch, "CAPTURES", {})
    assert all(different_bits(a.cpu(), b) is None for a, b in zip(found(), graphs, strict=True))


def test_a_model_that_waits_is_run_eagerly(device):
    x, network = torch.rand(4, 1, 8, 8, device=device), tiny(3).to(device)
    for model, note in ((network, False), (lambda images: network(images) * float(images.mean() < 9), True)):
        classifier = BaseClassifier(model, x, 3, rows=64, compile=False)
        sampler = sampler_of(classifier, x, 3, Noise.of("lattice", 0.5), 1, 5000)
        with sampler.counting(ops.tally_votes, 4, 4) as counts:
            counts.add([(0, 1, 0, 40, 2)])
        assert int(counts.table[2].sum()) == 40 and bool(classifier.notes) == note
        assert all("no CUDA graph" in each for each in classifier.notes)


def test_a_batch_of_certification_does_not_wait(device):
    sampler = sampler_of(tiny(3).to(device), torch.rand(2, 1, 8, 8), 3, Noise.of("lattice", 0.5), 1, 5000, rows=64)
    with sampler.counting(ops.tally_votes, 66, 4) as counts:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(5):
                counts.add([(0, 1, 64 * number, 40, 0), (1, 1, 64 * number, 24, 1)])
                report = _Report(counts.table, np.arange(2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(report.values().sum()) == 64


def test_poison(device):
    """Crafting has steps that amplify rounding: it ends in the ball, moves the images, and solved its systems."""
    data = blobs()
    recipe = Recipe(epochs=2, clean_batch=30, poison_batch=10, upper_batch=10, lower_steps=3, restart=2, solver_steps=5)
    attack = Pacd(Gaussian(0.4), 1, Ball(0.1, "linf"), model="test_cuda:tiny", recipe=recipe)
    made = pacd(data, attack, device=device)
    assert 0.02 < float(made.distortion(data).max()) <= 0.1 and made.images.device.type == "cpu"
    plan = MetaPoison(
        poison_class=1, adversarial_class=1, target_index=(0,), budget=0.1, model="test_cuda:tiny", surrogates=2,
        steps=2, epochs=3, batch_size=16, lr=0.05, unroll=2, craft_lr=0.5,
    )  # fmt: skip
    made = metapoison(data, plan, device=device)
    assert 0 < float(made.distortion(data).max()) <= 16 / 255
