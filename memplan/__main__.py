"""``python -m memplan``: the same as the command ``memplan``."""

import sys

from memplan.cli import main

if __name__ == "__main__":
    sys.exit(main())
