"""Floor 7: a folded checkpoint written again in a layout that stock classes and engines read. Directory in, directory out."""
