"""The parts of :func:`moesaic.prove`, each usable alone; nothing here needs a process group but ``gradients``."""
