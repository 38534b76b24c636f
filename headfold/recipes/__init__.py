"""Floor 4: recipes, files of YAML that say how models are folded; read with the line of every word, and written beside a fold."""
