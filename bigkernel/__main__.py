"""``python -m bigkernel`` is the ``bigkernel`` command."""

import sys

from bigkernel.cli import main

if __name__ == "__main__":
    sys.exit(main())
