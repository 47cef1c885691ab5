"""Which experts tokens go to: recorded, played again, or forced. See docs/routing.md."""

from moesaic.layers.steering import Pass, Record, force, record, replay

__all__ = ["Pass", "Record", "force", "record", "replay"]
