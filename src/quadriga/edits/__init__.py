"""Checkpoints made from others: upcycled, pruned, merged, from a delta; and what must be measured for that."""
