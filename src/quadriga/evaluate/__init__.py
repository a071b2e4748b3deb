"""Benchmarks: tasks, the harness that runs them over any model, and the tables that compare. Never imports the engine."""
