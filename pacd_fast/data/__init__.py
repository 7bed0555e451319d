"""Images and labels in memory, from every kind of file that holds them.

`datasets` is what callers see, `formats` and `npz` read files into arrays, `arrays` takes what callers have in memory.
Imports `arguments`, `files` and `ops` at most.
"""

from pacd_fast.data.arrays import as_float, as_images, images_of, labelled
from pacd_fast.data.datasets import NAMES, Dataset, load_dataset, random_subset
from pacd_fast.data.npz import UNREADABLE, Npz, open_npz

__all__ = [
    "NAMES",
    "UNREADABLE",
    "Dataset",
    "Npz",
    "as_float",
    "as_images",
    "images_of",
    "labelled",
    "load_dataset",
    "open_npz",
    "random_subset",
]
