"""Text to tokens and back: vocabularies, chat templates, and detokenising as the tokens come."""
