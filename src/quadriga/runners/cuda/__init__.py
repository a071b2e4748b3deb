"""A model on a GPU, on the kernels of ``kernels.triton``: QUADRIGA_OPS=triton. Never run on one so far: docs/gpu.md.

    PassBatch ─► inputs ─► model: embed, [mixer, feed-forward] per layer, head ─► logits on the device
                  │ one copy to the device                                          │ sampling ─► one wait: the ids
    only single tokens: graphs, the same pass captured once for each size of batch

On a host the kernels are interpreted (TRITON_INTERPRET=1), which is how the tests hold this runner to plain torch.
"""
