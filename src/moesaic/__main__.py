"""`python -m moesaic`: the same as the `moesaic` command, as a module that torchrun can start."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    sys.exit(main())
