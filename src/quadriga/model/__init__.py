"""The model: its specs, its arithmetic, its layers and the families it can be."""
