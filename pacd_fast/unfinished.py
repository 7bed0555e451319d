"""The old name of `files`, until its last importer has moved."""

from pacd_fast.files import AnotherRun, read, replaced, restore, write

__all__ = ["AnotherRun", "read", "replaced", "restore", "write"]
