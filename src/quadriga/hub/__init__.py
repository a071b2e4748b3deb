"""Named models: where they come from, the cache they are kept in, and how those that are made here are built."""
