"""``moesaic plan``: what a layout costs, worked out before anybody pays for it.

From the config of a model and the number of devices: which layouts are legal, what a rank of each holds in memory and
sends, and how long a step takes.
"""
