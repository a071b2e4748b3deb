"""From text to token shards: recipe, readers, cleaning, filters, de-duplication, decontamination, tokens, manifest."""
