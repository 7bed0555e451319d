"""Images and labels in memory, from every kind of file that holds them.

`datasets` is what callers see, `formats` reads files into arrays.  Imports `arguments`, `files` and `ops` at most.
"""

from pacd_fast.data.datasets import NAMES, Dataset, as_float, load_dataset, random_subset
from pacd_fast.data.formats import UNREADABLE

__all__ = ["NAMES", "UNREADABLE", "Dataset", "as_float", "load_dataset", "random_subset"]
