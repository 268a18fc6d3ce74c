"""``python -m clagrange`` is the command ``clagrange``."""

import sys

from clagrange.cli import main

if __name__ == "__main__":
    sys.exit(main())
