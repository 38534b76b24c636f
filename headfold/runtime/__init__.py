"""Floor 6: a folded checkpoint as a running model. Importing it makes the attention `headfold` known to transformers."""

from . import modeling_headfold as modeling_headfold
