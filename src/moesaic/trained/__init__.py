"""What is done with a trained model: `moesaic generate` and `moesaic eval`.

Nothing is imported here, so that their `--help` is quick.
"""
