"""Training a vector on the training split of a harness task.

May import ``lm``, ``harness``, ``engine`` and the rooms below them; knows nothing of reports or studies.
A new objective, recipe, selection rule or control goes here.
"""
