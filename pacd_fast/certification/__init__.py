"""Randomized smoothing: sampling, certificates, their files and summaries.

`sampler` draws votes, `vote` turns them into certificates, `smooth` is the drop-in class, `soft` certifies mean
probabilities, `monte_carlo` any yes/no function, `dataset` certifies images of a data set into a file, `results` is
that file, `merging` several as one, `summary` what it comes to, `selftest` tests noise and bounds on the user's
machine.  Imports `arguments`, `files`, `tables`, `ops`, `data`, `networks`.
"""

from pacd_fast.certification.dataset import Selection, certify_dataset
from pacd_fast.certification.merging import exactly, merge, pooled
from pacd_fast.certification.monte_carlo import (
    SmoothingCertificate,
    discrete_guarantee,
    gaussian_guarantee,
    kl_guarantee,
    randomized_smoothing_certificate,
)
from pacd_fast.certification.results import (
    ABSTAIN,
    Results,
    ResultsFile,
    Row,
    Run,
    peek,
    read_results,
    round_down,
)
from pacd_fast.certification.sampler import Model
from pacd_fast.certification.smooth import Smooth
from pacd_fast.certification.soft import SoftCertificates, bernstein_lower, soft_certify
from pacd_fast.certification.summary import Summary, summarize, summary_table
from pacd_fast.certification.vote import (
    Certificate,
    Certificates,
    certify,
    certify_each,
    check_arguments,
    largest_radius,
    smallest_n,
)

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Certificates",
    "Model",
    "Results",
    "ResultsFile",
    "Row",
    "Run",
    "Selection",
    "Smooth",
    "SmoothingCertificate",
    "SoftCertificates",
    "Summary",
    "bernstein_lower",
    "certify",
    "certify_dataset",
    "certify_each",
    "check_arguments",
    "discrete_guarantee",
    "exactly",
    "gaussian_guarantee",
    "kl_guarantee",
    "largest_radius",
    "merge",
    "peek",
    "pooled",
    "randomized_smoothing_certificate",
    "read_results",
    "round_down",
    "smallest_n",
    "soft_certify",
    "summarize",
    "summary_table",
]
