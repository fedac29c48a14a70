"""One vector and one model: the file format, the methods, and the hooks that apply them.

May import ``_util`` only; nothing here knows lm-eval.
A new method goes in ``methods``, support for a new model architecture in ``backbone``.
"""
