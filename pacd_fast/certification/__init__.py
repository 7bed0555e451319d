"""Randomized smoothing: sampling, certificates, their files and summaries.

`question` is what is asked of each image, `noise` what it is asked about, `classifier` the base classifier as one fixed
function, `batch` draws samples of it and counts, `sampler` those that a planner wants; `vote` turns votes into
certificates, `prediction` into classes; `smooth` is the drop-in class, `soft` certifies mean probabilities,
`monte_carlo` any yes/no function.  `dataset` certifies images of a data set into a file, `sharing` is how several
processes do it together; `rows` is what a file says, `results` the file, `rank_files` those of several processes,
`merging` several as one, `verification` checks one, `summary` is what it comes to; `timing` how fast it is; `selftest`
tests noise and bounds on the user's machine.
Imports `arguments`, `files`, `randomness`, `ranks`, `tables`, `ops`, `data`, `networks`.
"""

from pacd_fast.certification.classifier import BaseClassifier, Engine, Model
from pacd_fast.certification.dataset import Certify, Selection, certify_dataset, predict_dataset, sigma_of
from pacd_fast.certification.merging import exactly, merge, pooled
from pacd_fast.certification.monte_carlo import (
    SmoothingCertificate,
    discrete_guarantee,
    gaussian_guarantee,
    kl_guarantee,
    randomized_smoothing_certificate,
)
from pacd_fast.certification.noise import Noise
from pacd_fast.certification.prediction import Predictions, predict
from pacd_fast.certification.question import Question, largest_radius, smallest_n
from pacd_fast.certification.results import ResultsFile, peek, read_results
from pacd_fast.certification.rows import ABSTAIN, Results, Row, Run, rounded
from pacd_fast.certification.smooth import Smooth
from pacd_fast.certification.soft import SoftCertificates, bernstein_lower, soft_certify
from pacd_fast.certification.summary import Summary, summarize, summary_table
from pacd_fast.certification.timing import certification_times
from pacd_fast.certification.verification import redraw, verify
from pacd_fast.certification.vote import Certificate, Certificates, certify, certify_each

__all__ = [
    "ABSTAIN",
    "BaseClassifier",
    "Certificate",
    "Certificates",
    "Certify",
    "Engine",
    "Model",
    "Noise",
    "Predictions",
    "Question",
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
    "certification_times",
    "certify",
    "certify_dataset",
    "certify_each",
    "discrete_guarantee",
    "exactly",
    "gaussian_guarantee",
    "kl_guarantee",
    "largest_radius",
    "merge",
    "peek",
    "pooled",
    "predict",
    "predict_dataset",
    "randomized_smoothing_certificate",
    "read_results",
    "redraw",
    "rounded",
    "sigma_of",
    "smallest_n",
    "soft_certify",
    "summarize",
    "summary_table",
    "verify",
]
