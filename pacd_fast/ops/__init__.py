"""The tensor operators: one compiled function each, by itself, on CPU and CUDA tensors, under autograd and
torch.compile.

A file a family: the documented wrapper, its fake (shapes without data, for the compiler) and its gradient stand
together; `reference` says the same in plain torch and NumPy, for tests and benchmarks alone.  Bad input is a
ValueError.  Imports nothing of the package but its compiled libraries.
"""

from pacd_fast.ops.bounds import clopper_pearson_lower, clopper_pearson_upper, normal_quantile
from pacd_fast.ops.chernoff import chernoff_newton, chernoff_newton_pairs
from pacd_fast.ops.convolution import convolve3x3, narrow_grad
from pacd_fast.ops.lattice import STEP, lattice_copies, lattice_of, lattice_step, require_on_lattice
from pacd_fast.ops.libraries import FLOATS, cuda_library, operators, transformed
from pacd_fast.ops.noise import noisy_copies
from pacd_fast.ops.pooling import max_pool_relu
from pacd_fast.ops.soft import soft_radius, soft_smooth
from pacd_fast.ops.votes import add_votes_, tally_votes

__all__ = [
    "FLOATS",
    "STEP",
    "add_votes_",
    "chernoff_newton",
    "chernoff_newton_pairs",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "convolve3x3",
    "cuda_library",
    "lattice_copies",
    "lattice_of",
    "lattice_step",
    "max_pool_relu",
    "narrow_grad",
    "noisy_copies",
    "normal_quantile",
    "operators",
    "require_on_lattice",
    "soft_radius",
    "soft_smooth",
    "tally_votes",
    "transformed",
]
