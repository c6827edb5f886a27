"""The lessons' own modules (checks, small, specs, solutions, build) are imported from tutorials/, as in a notebook."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tutorials"))
