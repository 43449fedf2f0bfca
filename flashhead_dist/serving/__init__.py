"""A vLLM server with either head, and vLLM's own benchmark client against it."""
