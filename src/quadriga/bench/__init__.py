"""Measurements: a model's speed beside this machine's limits, the speed claim, the load that a server bears."""
