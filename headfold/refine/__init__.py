"""Floor 7: improving merged heads block by block, by least squares (refit) and by gradient (heal)."""
