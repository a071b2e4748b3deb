"""Estimate what training or serving a model takes: memory, time, cost, mesh. Arithmetic only, imports no torch."""
