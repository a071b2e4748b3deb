"""Runners: a model and its cache, ready to compute passes over packed batches, one way each."""
