"""Floor 9: advice before a fold: what fits into a memory at each number of K/V heads, and whether a decoding step gets shorter."""
