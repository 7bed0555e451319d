"""The noise: known answers of the generator, its Gaussian numbers against mpmath, and their statistics."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
import torch

from pacd_fast import _C, ops
from pacd_fast.certification import selftest
from pacd_fast.ops import reference


def test_known_answers_of_random123():
    for counter, key, answer in selftest.KNOWN_ANSWERS:
        assert list(_C.philox4x32(counter, key)) == answer
        assert reference.philox4x32(np.array(counter, np.uint32), (key[0], key[1])).tolist() == answer


def test_random_bits_are_philox_of_the_documented_counter():
    seed, stream, image, sample = 2**63 - 3, 40_000, 2**47 + 12_345, 2**32 - 2
    bits = _C.random_bits(seed, stream, image, sample, 3, 2)
    for s in range(2):
        for block in range(3):
            counter = [block, sample + s, image & 0xFFFFFFFF, stream << 16 | image >> 32]
            assert list(_C.philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32])) == bits[s, block].tolist()


def test_elements_take_their_words_as_documented():
    z = ops.noisy_copies(torch.zeros(1, 200), 1.0, 1, 77, first=5, image_ids=torch.tensor([3]), stream=9)[0]
    bits = _C.random_bits(77, 9, 3, 5, 64, 1)[0]
    for e in (0, 15, 16, 31, 47, 63, 64, 127, 128, 199):
        tile, word, lane = e // 64, e % 64 // 16, e % 16
        pair = _C.normals(bits[16 * tile + lane].reshape(2, 2)).ravel()
        assert float(z[e]) == pair[word]


def test_box_muller_against_mpmath():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, (3000, 2), dtype=np.uint64)
    edges = [
        0,
        1,
        2,
        2**23,
        2**24 + 1,
        2**29 - 1,
        2**29,
        2**29 + 1,
        2**30,
        2**31 - 1,
        2**31,
        3 * 2**30,
        2**32 - 2,
        2**32 - 1,
    ]
    words = np.concatenate([words, np.array([(a, b) for a in edges for b in edges], np.uint64)]).astype(np.uint32)
    found = _C.normals(words)
    worst = worst_radius = 0.0
    with mp.workdps(50):
        for (a, b), (x, y) in zip(words.tolist(), found.tolist(), strict=True):
            # the uniform is rounded to float32: its error is part of the definition, the rest is the function's
            u = float(np.float32(float(np.float32(a)) * 2.0**-32 + 2.0**-33))
            radius, angle = mp.sqrt(-2 * mp.log(u)), mp.pi / 4 * (b & 0x1FFFFFFF) / 2**29
            pair = [mp.cos(angle), mp.sin(angle)]
            if b & 0x20000000:
                pair.reverse()
            cosine, sine = (-v if b & bit else v for v, bit in zip(pair, (0x40000000, 0x80000000), strict=True))
            worst = max(worst, abs(x - radius * cosine), abs(y - radius * sine))
            if radius > 0:
                worst_radius = max(worst_radius, abs(mp.hypot(x, y) / radius - 1))
    assert worst < 2e-6
    assert worst_radius < 4e-7
    assert 6.7 < float(np.abs(found).max()) < 6.77


@pytest.mark.parametrize("draws", [20_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_statistics_of_many_draws(draws):
    failed = [check for check in selftest.noise_checks(draws, seed=5) if check.verdict != "ok"]
    assert not failed


def test_the_selftest_can_fail(monkeypatch):
    """Noise that is a little off is noticed."""
    real = ops.noisy_copies

    def biased(*args, **options):
        return real(*args, **options) * 1.01

    def repeated(*args, **options):
        z = real(*args, **options)
        z[1::2] = z[::2][: len(z[1::2])]
        return z

    def clipped(*args, **options):
        return real(*args, **options).clamp(-4, 4)

    for broken, notices in ((biased, "moment 2"), (repeated, "neighbouring samples"), (clipped, "beyond 4 sigma")):
        monkeypatch.setattr(ops, "noisy_copies", broken)
        failed = [check.what for check in selftest.noise_checks(4_000_000, seed=1) if check.verdict != "ok"]
        assert any(notices in what for what in failed), (notices, failed)


def test_selftest_as_a_user_runs_it():
    found = list(selftest.checks(1_000_000))
    assert len(found) > 10 and all(check.verdict == "ok" for check in found)
    with pytest.raises(ValueError, match="draws"):
        next(selftest.checks(10))
