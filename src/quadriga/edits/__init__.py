"""Checkpoints derived from others by upcycling, pruning, merging or a delta, and the measurements these need."""
