"""Floor 9: a count of K/V heads per layer, from a budget: the request, measured sensitivities, the exact allocation."""
