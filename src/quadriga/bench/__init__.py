"""Benchmarks: a model's speed compared with this machine's limits, the speed claim, and load tests of servers."""
