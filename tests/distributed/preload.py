"""What every rank process needs imported. The fork server imports this once; its children inherit it.

Importing torch takes seconds, and 8 ranks on 2 cores would pay it 8 times for every test. A module that fails
to import here is left out: the test that needs it then reports the error in its own process.
"""

import contextlib
import importlib

_MODULES = (
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "hypothesis",
    "pytest",
    "moesaic",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)

for _name in _MODULES:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
