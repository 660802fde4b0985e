"""DeepSeek V3 and what is built like it."""
