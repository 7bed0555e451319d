"""Certified robustness by randomized smoothing, and attacks on it through the training data: fast and sound."""

from importlib.metadata import version

__version__ = version("pacd_fast")

from pacd_fast import ops  # noqa: E402  (loads the compiled libraries, which need the package's path)

__all__ = ["__version__", "ops"]
