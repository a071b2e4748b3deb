"""Where triton is missing, nothing here is collected but the file that says so."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_[!i]*.py"]
