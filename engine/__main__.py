"""`python -m engine` is the command `univigu`."""

import sys

from engine.cli import main

sys.exit(main())
