"""Forward passes that share work among requests, for training and scoring alike.

May import ``library``, ``steering`` and ``_util``.
Batching, masks, the KV cache, numerical precision and the checks against stock lm-eval go here.
"""
