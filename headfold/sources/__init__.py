"""Floor 4: what users bring instead of a plain checkpoint, made into one: quantised weights, GGUF files, pickles, adapters."""
