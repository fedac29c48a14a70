"""Scoring models with and without vectors, and comparing the results document by document.

May import ``training``, ``lm`` and the rooms below them.
A new statistic, table or figure of a report, or a new check of what may be compared, goes here.
"""
