"""Benchmarks: tasks, the harness that runs them on any model, and comparison tables. Never imports the engine."""
