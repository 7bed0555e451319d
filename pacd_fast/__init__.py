"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

from importlib.metadata import version

__version__ = version("pacd_fast")

from pacd_fast import ops
from pacd_fast.certify import Certificate, Certificates, Smooth, certify, certify_each, largest_radius, smallest_n
from pacd_fast.labelflips.certifier import FlipCertificates, LabelFlipCertifier
from pacd_fast.smoothing import SmoothingCertificate, randomized_smoothing_certificate
from pacd_fast.soft import SoftCertificates, soft_certify

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
