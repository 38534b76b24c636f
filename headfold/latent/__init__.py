"""Multi-head latent attention (MLA) as the target of a fold: one latent for K and V of all heads, and one rotary key."""
