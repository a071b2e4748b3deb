"""The operations of ``kernels.ops`` on a GPU, in Triton. Needs torch and triton (``pip install '.[gpu]'``).

A kernel is written once and used in three ways:

    launched      its tensors lie on a GPU: triton compiles it there
    interpreted   TRITON_INTERPRET=1 before this package is imported: it runs on the host, beside kernels.reference
    recorded      ``launch.recording()`` notes what would be launched. Tensors on the meta device only say their shapes,
                  so that a layer of any model is recorded anywhere; ``binary`` compiles what was noted for any GPU.

Rules for kernels, which ``tests/triton`` and ``make gpu-check`` hold:

- Host functions go through ``launch.launch``, read no value off a tensor (no ``.item()``, no ``.tolist()``) and never
  wait for the device: grids depend on shapes alone. A decode step can then be one CUDA graph.
- No atomics on floats, and every sum in one fixed order: tile and split sizes come from the model's sizes, never from
  how many tokens share a pass. So a token's result does not depend on its neighbours.
- Sums are float32. bfloat16 is widened right after its load, for the interpreter's own bfloat16 arithmetic is wrong;
  matrix products go through ``arithmetic.product``, which knows.
- A masked load names its ``other``. Tiles at an edge are masked, never assumed away.

A new kernel: its file, its function in ``backend`` if it is one of ``kernels.ops``, its rows in ``cases``, a test
beside ``kernels.reference`` in ``tests/triton``.
"""
