"""LoRA in peft's formats on models with our layers, parallel or not: on experts, routers and all linear layers."""

from moesaic.integrations.peft.add import add_adapters
from moesaic.integrations.peft.files import load_adapters, save_adapters
from moesaic.integrations.peft.merge import merge_adapters
from moesaic.integrations.peft.switch import disable_adapters, set_adapter

__all__ = ["add_adapters", "disable_adapters", "load_adapters", "merge_adapters", "save_adapters", "set_adapter"]
