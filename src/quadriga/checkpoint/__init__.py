"""Weight files in and out: safetensors, GGUF, Grok-1's pickles, and the catalogue of named models."""
