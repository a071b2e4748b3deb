"""The CPU's kernels: C++ in ``csrc``, and the NumPy side that packs weights, lays out programs and calls it."""
