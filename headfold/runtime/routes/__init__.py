"""One page per route: who reads which K/V head, decided while the model runs."""
