"""``python -m bigkernel`` is the ``bigkernel`` command."""

import sys

from bigkernel.cli import command

if __name__ == "__main__":
    sys.exit(command())
