"""Floor 4: how the heads of a group become one K/V head. One page per method: `merge(heads, groups, stats, *, seed, …)`."""
