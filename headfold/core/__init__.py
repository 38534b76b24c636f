"""Floor 1: heads, groups, statistics and plans as tensors and integers; no files, no transformers."""
