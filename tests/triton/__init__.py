"""Kernels for GPUs: interpreted on the host beside ``kernels.reference``, and compiled for GPUs that are not here."""
