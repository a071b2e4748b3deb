"""The model in torch: one forward, for training, for GPUs and as the statement the CPU's kernels are held to."""
