"""Floor 9: the page that `headfold report` writes, one file per section; it reads what folds, comparisons and measurements left."""
