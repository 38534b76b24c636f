"""Floor 7: improving merged heads, block by block by least squares (refit) or gradient (heal), or together by gradient (distill)."""
