"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

from importlib.metadata import version

__version__ = version("pacd_fast")

from pacd_fast import ops
from pacd_fast.certification import (
    Certificate,
    Certificates,
    Smooth,
    SmoothingCertificate,
    SoftCertificates,
    certify,
    certify_each,
    largest_radius,
    randomized_smoothing_certificate,
    smallest_n,
    soft_certify,
)
from pacd_fast.labelflips import FlipCertificates, LabelFlipCertifier

__all__ = [
    "Certificate",
    "Certificates",
    "FlipCertificates",
    "LabelFlipCertifier",
    "Smooth",
    "SmoothingCertificate",
    "SoftCertificates",
    "__version__",
    "certify",
    "certify_each",
    "largest_radius",
    "ops",
    "randomized_smoothing_certificate",
    "smallest_n",
    "soft_certify",
]
