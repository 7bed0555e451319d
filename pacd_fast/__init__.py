"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

from importlib.metadata import version

__version__ = version("pacd_fast")

from pacd_fast import ops
from pacd_fast.certify import Certificate, Certificates, Smooth, certify, certify_each, largest_radius, smallest_n

__all__ = [
    "Certificate",
    "Certificates",
    "Smooth",
    "__version__",
    "certify",
    "certify_each",
    "largest_radius",
    "ops",
    "smallest_n",
]
