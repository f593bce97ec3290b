"""`python -m llmpare.cli` is `llmpare`."""

import sys

from llmpare.cli.exits import main

sys.exit(main())
