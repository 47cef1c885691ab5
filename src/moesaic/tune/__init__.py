"""``moesaic tune``: measure which implementation is the fastest on this machine, and keep that.

The file is that of :mod:`moesaic.ops.tuned`, and :mod:`moesaic.ops.fastest` goes by it.
"""
