"""A hostile campaign against the command line: corrupted inputs, kills, races and full disks, with a judge of what is left behind.

`python -m hostile --minutes 10` in the directory `tests`, or `make fuzz MINUTES=10`. Everything is drawn from `--seed` and the number of
a case, so that a finding is repeated by `--only NUMBER`.
"""
