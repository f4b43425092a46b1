"""How all property tests run: no time limit for an example, since machines are shared, and no complaint about examples
that are slow to make or left out by an `assume`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "shared", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.load_profile("shared")
