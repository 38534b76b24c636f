"""Rounds in which the read-outs of keys are fitted. What holds after any number of them is tested after a few, which takes less time."""

from headfold.core import readout

FEW = 8
readout.MAX_ROUNDS = FEW
