"""One hypothesis profile for every test: the same examples on every machine, no timing."""

import os

from hypothesis import HealthCheck, Phase, settings

# Shrinking explains a failure; tests/mutants.py, which expects failures, does without.
explaining = () if os.environ.get("NANOCHAMELEON_NO_SHRINK") else (Phase.shrink, Phase.explain)
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.target, *explaining),
)
settings.load_profile("same")
