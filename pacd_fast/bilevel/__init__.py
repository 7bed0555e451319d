"""Bilevel optimisation: how a loss depends on what another loss, or an iteration, made of its input.

    lower problem                 inner*(outer), the answer                 upper loss
    a loss, a map, a function     found by any method, or by T steps        any function of the answer

`hypergradient` and `implicit` differentiate an answer however it was found, by the implicit function theorem and a
linear system; `unrolled` differentiates T steps of an optimiser.  They know nothing of images, poison or certificates.

Here: solvers.py and krylov.py (linear systems known by products), conditions.py (what makes an answer, and its
Jacobians' products), hypergradients.py, unrolling.py, rules.py (optimisers' steps), trees.py (tuples, dicts, modules of
tensors).
May import: pacd_fast.arguments.
"""

from pacd_fast.bilevel.conditions import CURVATURES, Composite, FixedPoint, Root
from pacd_fast.bilevel.hypergradients import hypergradient, implicit
from pacd_fast.bilevel.rules import SGD, Adam, AdamW, Rule
from pacd_fast.bilevel.solvers import SOLVERS, Solved, SolverWarning, WarmStart, solve
from pacd_fast.bilevel.unrolling import Unrolled, unrolled

__all__ = [
    "CURVATURES", "SGD", "SOLVERS", "Adam", "AdamW", "Composite", "FixedPoint", "Root", "Rule", "Solved",
    "SolverWarning", "Unrolled", "WarmStart", "hypergradient", "implicit", "solve", "unrolled",
]  # fmt: skip
