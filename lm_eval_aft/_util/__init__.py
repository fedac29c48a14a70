"""Helpers without a subject of their own: errors, files, processes, settings and trackers.

Imports no other room.
Code goes here only when two rooms need it and it knows nothing of vectors, models or tasks.
"""
