"""Calls of tools in what a model writes: the forms in use, and reading one as it comes."""
