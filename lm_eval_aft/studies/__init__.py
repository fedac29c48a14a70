"""Many runs from one file: benchmark studies, sets of vectors, searches and transfer matrices.

May import every room but ``cli``.
What is run, in which order and by whom is decided here; how one vector is trained or scored is not.
"""
