"""Folders of named vectors: store, find, add, share and route to them.

May import ``steering`` and ``_util``; listing a library never imports torch.
A new router is a decorated class in ``routers``.
"""
