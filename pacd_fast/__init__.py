"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

from importlib.metadata import version

__version__ = version("pacd_fast")

from pacd_fast import ops
from pacd_fast.certification import (
    Certificate,
    Certificates,
    Predictions,
    Smooth,
    SmoothingCertificate,
    SoftCertificates,
    certify,
    certify_each,
    largest_radius,
    predict,
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
    "Predictions",
    "Smooth",
    "SmoothingCertificate",
    "SoftCertificates",
    "__version__",
    "certify",
    "certify_each",
    "largest_radius",
    "ops",
    "predict",
    "randomized_smoothing_certificate",
    "smallest_n",
    "soft_certify",
]
