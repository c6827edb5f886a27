"""Optional. Buys an HTTP API that OpenAI's clients know: chat with images, and images from words."""
