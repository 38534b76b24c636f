"""One page per route: which query head reads which K/V head, decided while the model runs."""
