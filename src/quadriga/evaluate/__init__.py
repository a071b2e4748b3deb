"""Benchmarks: tasks, the harness that runs them over any model, tables that compare. Never imports the engine."""
