"""`moesaic report`: what runs have recorded, as one page of HTML that needs nothing else.

Nothing is imported here, so that `moesaic report --help` is quick.
"""
