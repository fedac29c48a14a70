"""Helpers without a subject of their own: errors, files, processes and settings.

Imports no other room.
Code goes here only when two rooms need it and it knows nothing of vectors, models or tasks.
"""
