"""Adapters in files, added to the weights in other files: tensor by tensor, and nobody has the whole model.

Legend: E experts, r rank, I and O the dims that peft takes for those that a weight comes from and goes to.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic import ranks
from moesaic.integrations.peft.add import add_adapters
from moesaic.integrations.peft.files import factors_by_expert, read_config, stored_factors
from moesaic.integrations.peft.switch import adapters_of
from moesaic.integrations.peft.targets import Target
from moesaic.integrations.transformers.convert import cast_and_merged
from moesaic.integrations.transformers.lazy import Box, LazyTensor
from moesaic.integrations.transformers.loading import Source, model_on_meta
from moesaic.integrations.transformers.naming import twins
from moesaic.integrations.transformers.saving import to_file_names, write_pretrained
from moesaic.integrations.transformers.swap import swap_moe

_NAME = "default"


@contextmanager
def merged_state(plain: Any, state: Mapping[str, LazyTensor], adapter: str | Path) -> Iterator[dict[str, LazyTensor]]:
    """The state of a transformers model with ``scale * a b`` of saved adapters added, while the files are open.

    A sum is made when a tensor is read, of the part that is read, in fp32 or the dtype of the weight if that is wider.

    Args:
        plain: the model, on the meta device.
        state: its tensors by name.
        adapter: a folder that :func:`load_adapters` takes.

    Raises:
        OSError: there is no such folder, or a file is missing.
        ValueError: a file is damaged, or the adapters do not fit the model; or a weight is tied to another one, which
            would change with it.
    """
    config = read_config(adapter)
    # A new model changes its config.
    model = add_adapters(swap_moe(model_on_meta(copy.deepcopy(plain.config))), config, _NAME)
    with stored_factors(model, adapter, _NAME) as stored:
        result = dict(state)
        for target in adapters_of(model, _NAME):
            name = target.weight_in_plain
            if twins(plain, name):
                raise ValueError(
                    f"adapter: '{name}' is tied to another weight, which would change with it; untie them, or load the "
                    "adapters beside the weights"
                )
            result[name] = _sum(result[name], *_product_of(target, stored), target.rank.scale)
        yield result


def export_merged(
    source: Source, adapter: str | Path, path: str | Path, add: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write a checkpoint of transformers with saved adapters added to its weights. Collective.

    Every rank writes its share, and has one tensor whole at a time: see :func:`export_pretrained`. So adapters that
    were trained on quantised experts come onto the weights that were quantised.

    Args:
        source: the checkpoint whose weights were frozen.
        adapter: see :func:`load_adapters`. All ranks must see the folder.
        path: the folder to write.
        add: writes more files into the folder, on rank 0, before the folder gets its name.

    Raises:
        OSError, ValueError: see :func:`merged_state` and :func:`export_pretrained`.
    """
    with ExitStack() as stack:
        # A failure is shared, so that no rank waits for one that cannot read the files.
        opened: list[Any] = []
        ranks.together(lambda: opened.append(stack.enter_context(cast_and_merged(source, adapter))))
        ((plain, tensors),) = opened
        write_pretrained(plain, to_file_names(plain, tensors), path, add=add)


def _product_of(target: Target, stored: Mapping[str, LazyTensor]) -> tuple[LazyTensor, LazyTensor]:
    """What, multiplied, has the layout of the weight: rows and columns; of experts, of each."""
    a, b = (stored[f"{target.key}.lora_{letter}.weight"] for letter in "AB")
    return (b, a) if target.link is None else factors_by_expert(a, b, target)


def _sum(weight: LazyTensor, rows: LazyTensor, columns: LazyTensor, scale: float) -> LazyTensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, rows.dtype), torch.float32)
    rank = slice(0, columns.shape[-2])

    def read(box: Box) -> Tensor:
        *experts, of_rows, of_columns = box
        # A copy, for a tensor that was read may be a view.
        result = weight.read(box).to(dtype, copy=True)
        left = rows.read((*experts, of_rows, rank)).to(dtype)
        right = columns.read((*experts, rank, of_columns)).to(dtype)
        # Expert by expert, so that no second tensor of this size is made.
        matrices = zip(result, left, right, strict=True) if experts else [(result, left, right)]
        for total, of_one, of_other in matrices:
            total += scale * of_one @ of_other
        return result

    return LazyTensor(weight.shape, dtype, read)
