"""Plug-ins for other projects. Optional: import the one you use."""
