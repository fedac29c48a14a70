"""One vector and one model: the file format, the methods, and the hooks that apply them.

May import ``_util`` only; nothing here knows lm-eval.
A new method is a decorated class in ``methods``; support for a new model architecture goes in ``backbone``.
"""
