"""Floor 7: how good a model is on real text, and whether a fold is what it claims to be."""
