"""`python -m recipelin` is `recipelin`."""

import sys

from .cli import main

sys.exit(main())
