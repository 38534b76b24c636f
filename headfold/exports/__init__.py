"""Floor 7: writes a folded checkpoint in a layout that stock classes and engines read; reads one directory and writes another."""
