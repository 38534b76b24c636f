"""What sharing costs a set of heads. One page per cost: `cost(heads, stats) -> Callable[[tuple[int, ...]], float]`."""
