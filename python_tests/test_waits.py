"""Hot loops do not wait for the device: what would make a card's host wait is counted, here on the CPU.

On a card `torch.cuda.set_sync_debug_mode` says the same of the same loops (test_cuda.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pacd_fast.certification import sampler
from pacd_fast.certification.vote import certify
from pacd_fast.data import Dataset
from pacd_fast.poisoning import Ball, MetaPoison, Pacd, Recipe, metapoison, pacd
from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, evaluation, fit, loop

READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
TOLD = {"tolist", "numpy", "cpu", "__array__"}


class _Below(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if masks and name != "index" and args[2].numel() == 1:
            masks = False  # torch fills through the mask
        self.found[name] += name in READ or masks
        return func(*args, **(kwargs or {}))


class _Above(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        moves = name == "to" and any(isinstance(each, torch.device | str) for each in (*args[1:], *kwargs.values()))
        if name in TOLD or ((moves or name in ("tensor", "as_tensor")) and not kwargs.get("non_blocking")):
            self.found[name] += 1
        return func(*args, **kwargs)


def waits(function: Callable[[], object]) -> Counter[str]:
    """What a call does that would make the host wait for a card, and how often."""
    found: Counter[str] = Counter()
    with _Above(found), _Below(found):
        function()
    return +found


def more(short: Callable[[], object], long: Callable[[], object]) -> int:
    """Waits that the longer call has more; what happens in the first call alone is not counted."""
    short()
    return waits(long).total() - waits(short).total()


def test_waits_are_seen():
    x = torch.arange(4.0)
    assert waits(lambda: float(x.sum())) == {"_local_scalar_dense": 1}
    assert waits(lambda: bool((x > 1).any())).total() == 1
    assert waits(lambda: x[x > 1]).total() == 1 and waits(lambda: x.tolist()).total() == 1
    assert waits(lambda: x.to("cpu")).total() == 1 and waits(lambda: torch.tensor([1.0])).total() == 1
    y = x.clone().requires_grad_()
    assert not waits(lambda: (y * 2)[1:].sum().backward())


def tiny(num_classes: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


def blobs(count: int = 240) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
    parts = [(images[part], labels[part]) for part in (slice(None), slice(30), slice(30, 60))]
    return Dataset("blobs", *parts[0], *parts[1], *parts[2], tuple("abc"))


@pytest.mark.parametrize(
    "loss", [Standard(), Gaussian(0.25, 2), Macer(0.25, k=2, lam=1.0), SmoothAdv(0.25, 0.25)], ids=str
)
def test_a_step_of_training_does_not_wait(loss, monkeypatch):
    """Twenty steps have one look at whether a loss was finite, and two numbers of the bar."""
    monkeypatch.setitem(loop.LOOKS, "cpu", 20)
    data = blobs()

    def run(images: int) -> None:
        fit(tiny(3), (data.x_train[:images], data.y_train[:images]), loss, epochs=1, batch_size=4, augment=True)

    assert more(lambda: run(80), lambda: run(240)) <= 2 * 3


def test_a_step_of_crafting_waits_once_a_product():
    data = blobs()

    def run(lower_steps: int = 2, products: int = 3, epochs: int = 1) -> None:
        recipe = Recipe(
            epochs=epochs, clean_batch=30, poison_batch=40, upper_batch=10, lower_steps=lower_steps, restart=9,
            solver_steps=products, tolerance=0.0,
        )  # fmt: skip
        pacd(data, Pacd(Gaussian(0.4), 1, Ball(0.1, "linf"), model="test_waits:tiny", recipe=recipe))

    assert more(lambda: run(), lambda: run(lower_steps=9)) == 0
    assert 0 < more(lambda: run(), lambda: run(products=8)) <= 2 * 5  # two batches of poison an epoch
    assert more(lambda: run(), lambda: run(epochs=2)) <= 2 * (3 + 10)


def test_a_surrogates_epoch_does_not_wait_for_its_batches():
    data = blobs()

    def run(batch_size: int) -> None:
        attack = MetaPoison(
            1, 2, budget=0.2, model="test_waits:tiny", surrogates=2, steps=1, epochs=2, batch_size=batch_size, lr=0.01
        )
        metapoison(data, attack)

    assert waits(lambda: run(240)) and more(lambda: run(240), lambda: run(40)) == 0


def test_a_step_of_the_attack_seldom_waits():
    x, y, network = torch.rand(6, 1, 8, 8), torch.zeros(6).long(), tiny(3)
    attack = evaluation._Attack(network, 0.25, 4, 40, 0)
    still = torch.full((6,), 1e-9)  # nothing becomes wrong, and nothing leaves the batch
    y = network(x).argmax(1)
    first = waits(lambda: attack.run(x, y, torch.arange(6), still, 20))
    second = waits(lambda: attack.run(x, y, torch.arange(6), still, 40))
    assert (second - first).total() == 20 / evaluation.DROPPED


@pytest.mark.parametrize("noise", ["lattice", "float"])
def test_a_batch_of_certification_does_not_wait(noise, monkeypatch):
    """But for the votes, which are asked for when they have long been there."""
    monkeypatch.setattr(sampler, "AHEAD", {"cpu": 2})
    images = torch.randint(0, 256, (2, 1, 8, 8)) / 255

    def run(n: int) -> None:
        certify(tiny(3), images, num_classes=3, sigma=0.25, n=n, seed=1, batch_size=64, noise=noise, futility=0)

    first, second = waits(lambda: run(1000)), waits(lambda: run(5000))
    assert set(second - first) <= {"numpy"}
