"""Vectors in other tools' formats, and other tools' vectors as ours.

May import ``library``, ``steering`` and ``_util``; only ``cli`` and scripts import it.
A new format is a decorated class in ``formats``, with a module of its own if it is long.
"""
