"""Weight files in and out, as NumPy arrays: safetensors, GGUF, torch's and Grok-1's pickles, our own directory."""
