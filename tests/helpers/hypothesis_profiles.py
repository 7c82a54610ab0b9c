"""How many examples a property is tried with: few of the same each time, or many new ones.

    python -m pytest --hypothesis-profile=many -m "hypothesis or no_cover"      # `make soak` does

The usual run decides about a change, so it must not fail over an example that the change has nothing to do with; nor
may any because the machine is busy: no example has a deadline, and their making may be slow.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_TIMES = 20


def register_profiles() -> None:
    """For `conftest.py`: before pytest reads `--hypothesis-profile`."""
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    patient = settings.get_profile("patient")
    settings.register_profile("usual", patient, derandomize=True, database=None)
    settings.register_profile("many", patient, derandomize=False)
    settings.load_profile("usual")


def examples(usual: int) -> int:
    """So many in the usual run, and more where many are asked for."""
    return usual * (_TIMES if settings.get_current_profile_name() == "many" else 1)
