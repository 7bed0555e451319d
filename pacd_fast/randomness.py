"""Who draws which random numbers: streams of noise, seeds derived from seeds, and torch's generators for a while.

Noise is a function of (seed, stream, image, sample, element).  Different uses of one seed have different streams, so
that they never share a sample.  Everything else that is drawn gets a seed of its own by `mix`: the run's seed, a
Purpose, and what it is numbered by (epoch, step, ...).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator

import torch

__all__ = ["FURTHER_DIGITS", "Purpose", "Stream", "mix", "seeded"]


class Stream(enum.IntEnum):
    """The streams of `ops.noisy_copies` and `ops.lattice_copies`; 15 bits."""

    SELECTION = 0  # the n0 samples that choose a class
    ESTIMATION = 1  # the n samples that bound its probability
    TRAINING = 2
    EVALUATION = 3  # accuracy under noise, and the noise of PGD
    UPPER_LOSS = 4  # PACD's
    TUNING = 5  # throw-away copies, to time a network


FURTHER_DIGITS = 0x8000
"""Lattice noise on a stream reads digits 33 to 64 of its uniform numbers, where it needs them, from stream + 2^15."""


class Purpose(enum.IntEnum):
    """What a derived seed is for.  Uses of different runs may have equal numbers: their runs' seeds differ."""

    # training.fit: mix(seed, epoch) is the order of the images
    DROPOUT = 1
    NOISE = 2
    # poisoning.pacd
    PACD_WEIGHTS = 11
    PACD_ORDER = 12
    PACD_BATCHES = 13
    PACD_LOWER_NOISE = 14
    PACD_PROBLEM_NOISE = 15
    PACD_UPPER_NOISE = 16
    PACD_PROBLEM_DROPOUT = 17
    PACD_DROPOUT = 18
    # poisoning.metapoison
    SURROGATE_WEIGHTS = 11
    SURROGATE_ORDER = 12
    PERTURBATION_START = 13
    SURROGATE_DROPOUT = 14
    # victims of targeted poison
    VICTIM_WEIGHTS = 21
    VICTIM_TRAINING = 22
    BASELINE_NOISE = 23
    # the figure of weight trajectories
    TRAJECTORY_WEIGHTS = 31
    TRAJECTORY_TRAINING = 32


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several integers (splitmix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """torch's generators of the CPU and of this device at a seed, for weights, dropout and the like.

    They are as they were afterwards.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
