"""Vectors in other tools' formats, and other tools' vectors as ours.

May import ``library``, ``steering`` and ``_util``; only ``cli`` and scripts import it.
A new format is a module here and an entry in ``formats``.
"""
