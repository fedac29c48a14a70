"""Forward passes that share work among requests, for training and scoring alike.

May import ``library``, ``steering`` and ``_util``.
Rows and masks are made in ``rows``, training's batches in ``batching``; ``fallback`` chooses how requests are
scored, ``scorer`` and ``generation`` do it, ``stock`` runs lm-eval's own code, ``checks`` compares with it,
and ``active_steering`` knows what steers the model, and puts it there.
"""
