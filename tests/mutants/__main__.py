"""``python -m tests.mutants [ROOM ...]``: see ``tests.mutants.run``."""

from __future__ import annotations

import sys

from tests.mutants.run import main

if __name__ == "__main__":
    sys.exit(main())
