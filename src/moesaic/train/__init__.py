"""The training program `moesaic train`.

`loop.train(config)` runs it. Nothing is imported here, so that `moesaic train --help` is quick.
"""
