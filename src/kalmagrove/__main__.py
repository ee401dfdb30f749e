"""``python -m kalmagrove``."""

import sys

from kalmagrove.cli import main

sys.exit(main())
