"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

import os
import signal
import sys
from importlib.metadata import version
from typing import Any

__version__ = version("pacd_fast")


def _stopped(number: int, frame: Any) -> None:
    """Ctrl-C while torch is being imported, before `cli.main` is there to take it."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\npacd-fast: stopped\n")
    os._exit(130)


_program = (sys.argv or [""])[0]
if os.path.basename(_program) == "pacd-fast" or (_program == "-m" and "pacd_fast" in sys.orig_argv):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stopped)
    try:
        os.getcwd()
    except FileNotFoundError:  # MKL would end the process, with a word about a library
        sys.stderr.write("pacd-fast: the folder that it was started in is gone; change to one that is there\n")
        raise SystemExit(2) from None

# ruff: noqa: E402 (torch comes with these)
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
