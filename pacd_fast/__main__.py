"""python -m pacd_fast: the command line."""

import sys

from pacd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
