"""Floor 4: which heads share one K/V head. One page per solver: `group(cost, num_heads, num_kv_heads, *, seed, …) -> Groups`."""
