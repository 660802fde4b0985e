"""DeepSeek V3 and models with its layout."""
