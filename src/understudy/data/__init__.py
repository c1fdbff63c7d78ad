"""Text in: conversations streamed from JSON Lines, prompt sets, and the built-in corpus. No model code and no torch at import."""
