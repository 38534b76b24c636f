"""Floor 1: the nouns. Tensors and integers; no files, no transformers."""
