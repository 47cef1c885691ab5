"""Cheap checks of a call, before there is a process group, so that mistakes are reported at once."""

from __future__ import annotations

from moesaic.parallel.mesh import resolve_layout, sizes_in
from moesaic.parallel.nodes import check_ranks_per_node
from moesaic.train.architecture import check_fits, find_model
from moesaic.train.compiled import check_compile
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError, check_packages
from moesaic.train.folder import check_free
from moesaic.train.loader import check_batch_size
from moesaic.train.lora import check_adapters
from moesaic.train.main_grads import check_main_grads
from moesaic.train.pipelining import check_pipeline, passes
from moesaic.train.runtime import launched_world_size


def check_launch(config: TrainConfig) -> None:
    """Raise `UserError` if this config cannot run on the processes that were launched, or a package is missing."""
    check_packages("training", "train", "transformers", "tokenizers")
    try:
        layout = resolve_layout(launched_world_size(), **sizes_in(config))
        check_ranks_per_node(config.ranks_per_node, launched_world_size())
    except ValueError as error:
        raise UserError(str(error)) from error
    check_main_grads(config, layout)
    check_compile(config)
    if config.out is not None and config.resume is False:
        check_free(config.out)
    source = find_model(config.model)
    check_adapters(config, source)
    if not source.pretrained:
        # Configs of pretrained models have other keys. The plan checks those models before weights are loaded.
        check_fits(source.values, layout)
    check_pipeline(config, layout, source.text_values.get("num_hidden_layers"))
    check_batch_size(config.batch_size, layout.dp_size, passes(config))
