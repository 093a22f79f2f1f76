"""`python -m saeray`: the command line, as jobs on a cluster run it."""

import sys

from saeray.client.cli import main

if __name__ == "__main__":
    sys.exit(main())
