"""The operations a model is made of (``ops``), and what computes them: torch, training's own passes, the CPU's C++."""
