"""One page per route: which K/V head each query head reads, decided while the model runs."""
