"""moesaic: MoE experts tiled over a device mesh."""
