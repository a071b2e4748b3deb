"""Weights that a published quantiser packed into safetensors, read as the numbers they stand for: one file a method."""
