"""``aft doctor``: what is installed, and whether steering gives the right answers with it.

Nothing here is used by the rest of the package but by the command.
"""
