"""Folders of named vectors: store, find, add, share and route to them.

May import ``steering`` and ``_util``; listing a library never imports torch.
What a vector is called, where it is kept and which one a request gets is decided here.
"""
