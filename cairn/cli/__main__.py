"""``python -m cairn.cli``."""

import sys

from cairn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
