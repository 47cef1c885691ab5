"""The interfaces of other packages, computed by moesaic."""
