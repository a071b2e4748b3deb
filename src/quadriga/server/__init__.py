"""The HTTP server: OpenAI's and Anthropic's interfaces, the chat page, and a look at the experts."""
