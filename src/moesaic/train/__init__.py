"""The training program behind `moesaic train`: text in, a mixture-of-experts language model out.

`loop.train(config)` runs all of it. Nothing is imported here, so that `moesaic train --help` answers at once.
"""
