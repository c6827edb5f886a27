"""One hypothesis profile for every test: the same examples on every machine, no timing."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=50, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")
