"""Block formats of weights: what each looks like in memory, and the plain code that packs and unpacks it."""
