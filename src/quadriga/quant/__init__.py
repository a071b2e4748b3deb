"""Quantised weight formats: their layouts, reference code to quantise and dequantise, and the choice under a budget."""
