"""`python -m examples.complete_journey`: see `cli`."""

import sys

from examples.complete_journey.cli import main

if __name__ == "__main__":
    sys.exit(main())
