"""Scripts for engines that build a model of their own from a checkpoint: each runs the engine's builder, in the engine's environment."""
