"""What every rank process needs imported. The fork server imports this once; its children inherit it.

Importing torch takes seconds, and 8 ranks on 2 cores would pay it 8 times. A module that fails to import here is left
out: whoever needs it then gets the error in its own process.
"""

import contextlib
import importlib
import os

_MODULES = (
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "moesaic",
)

for _name in (*_MODULES, *filter(None, os.environ.get("MOESAIC_PRELOAD", "").split(","))):
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
