"""Named models: where they come from, the cache that stores them, and how derived ones are built."""
