"""What it costs a set of heads to share one K/V head. One page per cost: `cost(heads, stats, …) -> Cost`."""
