"""Floor 4: which heads share. One page per solver: `group(cost, num_heads, num_kv_heads, *, seed, …) -> Groups`."""
