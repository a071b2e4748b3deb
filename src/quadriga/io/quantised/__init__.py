"""Weights that a published quantiser packed into safetensors, read as the numbers they stand for: one file a method."""

from __future__ import annotations

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files of settings beside a config.json without any, and the method that they are of."""
