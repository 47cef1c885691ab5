"""Load checkpoints into sharded models. Each rank reads only its own slices."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import CONFIG_NAME

from moesaic import ranks
from moesaic.integrations.transformers import ties
from moesaic.integrations.transformers.configs import damage_is_value_error, read_config, read_generation_config
from moesaic.integrations.transformers.files import Files, open_files
from moesaic.integrations.transformers.lazy import LazyTensor
from moesaic.integrations.transformers.mxfp4 import FORMAT, Stored, decoded, is_mxfp4, set_apart, to_our_parts
from moesaic.integrations.transformers.naming import to_model_names
from moesaic.integrations.transformers.origin import origin_of
from moesaic.integrations.transformers.packed import fill_packed
from moesaic.integrations.transformers.plain import is_of_adapter, name_without_wrappers
from moesaic.integrations.transformers.swap import swap_moe
from moesaic.layers import quantize_
from moesaic.ops import Implementation
from moesaic.ops.arguments import nearest
from moesaic.ops.quantized import Format
from moesaic.parallel import Meshes, build_meshes, parallelize
from moesaic.parallel.experts import ComputeOn
from moesaic.parallel.mesh import check_meshes
from moesaic.parallel.meta import materialize
from moesaic.parallel.recompute import Recompute
from moesaic.parallel.split import PipelineConfig, Stages, names_in_whole, split_into_stages
from moesaic.sharding.parts import local_part

# No buffer of transformers holds it.
_UNSET = -77

_log = logging.getLogger(__name__)


def load_pretrained(
    path: str | Path,
    meshes: Meshes | None = None,
    *,
    dtype: torch.dtype | None = None,
    compute: ComputeOn = "dtensor",
    capacity: int | None = None,
    recompute: Recompute = "none",
    reshard_after_forward: bool = True,
    impl: Implementation | None = None,
    device: torch.device | str | None = None,
    ignore_unexpected: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    adapter: Any = None,
    quantize: Format | None = None,
    pipeline: PipelineConfig | None = None,
    **options: Any,
) -> Any:
    """A causal language model of transformers with our layers, sharded over the meshes, with weights from safetensors.

    The model is ``parallelize(swap_moe(AutoModelForCausalLM.from_pretrained(path)), meshes)``, bit for bit. But no rank
    ever has all of it: the model is built on the meta device, and every rank reads only its own slices of the files.
    Weights that the config ties stay apart if the files have different numbers for them, as in ``from_pretrained``.
    The config of the model then says so.

    Collective if there is a process group.

    Args:
        path: a folder, or a name on the hub. It has ``model.safetensors`` or an index of several files, in any layout
            that transformers knows for the family.
        meshes: from :func:`moesaic.build_meshes`; None for one process.
        dtype: dtype of the parameters. None takes that of the config, or else that of the files.
        compute, capacity, recompute, reshard_after_forward: see :func:`moesaic.parallelize`.
        impl: see :func:`swap_moe`.
        device: None takes the device of the meshes, or the CPU without meshes.
        ignore_unexpected: leave out tensors of the files that the model does not have, such as the vision model of
            Llama-4 or layers that predict several tokens (MTP). A warning counts them. Missing tensors are an error
            all the same.
        revision: a branch, a tag or a commit on the hub.
        attn_implementation: as for ``from_pretrained``.
        adapter: low-rank adapters to put on the model: a ``peft.LoraConfig`` for new ones, or the folder of some. See
            :func:`moesaic.integrations.peft.add_adapters` and :func:`moesaic.integrations.peft.load_adapters`. They are
            active and called ``"default"``, and the rest of the model is frozen.
        quantize: hold the experts' weights in this format, read-only, as :func:`moesaic.layers.quantize_` does. Each
            rank quantises its part, expert by expert, so that none has them in another form. With ``adapter`` this is
            QLoRA. None leaves them as the files have them: those of gpt-oss in MXFP4 stay so, and are never all
            decoded.
        pipeline: with meshes that have ``pp``, how the model is cut into stages. Each rank reads the layers of its own.
        options: those of :func:`swap_moe`, such as ``aux_loss_coef``; and values of the config that take the place of
            those in ``config.json``, such as ``rope_parameters``.

    Returns:
        The model, in eval mode; with ``pp`` its :class:`moesaic.parallel.Stages`.

    Raises:
        OSError: there is no such checkpoint, or a file is missing.
        ValueError: a file is damaged, and the message names it and what is wrong in it; the files do not fit the model,
            or the model cannot be swapped or sharded over the meshes. The message lists all missing and unexpected
            names and all wrong shapes. No number has been read then.
        TypeError: an option is one of neither :func:`swap_moe` nor the config; ``meshes`` are no meshes of ours.
        NotImplementedError: the files need a conversion that cannot be done slice by slice; the message names it.

    Example:
        >>> meshes = moesaic.build_meshes(ep=4)
        >>> model = load_pretrained("path/to/model", meshes, dtype=torch.bfloat16)
    """
    if meshes is None:
        meshes = build_meshes() if not ranks.active() else None
    if meshes is None:
        raise ValueError(f"meshes: there are {ranks.world_size()} ranks; pass the result of moesaic.build_meshes()")
    check_meshes(meshes)
    of_swap = inspect.signature(swap_moe).parameters.keys() - {"model", "impl"}
    source = Source(
        path,
        dtype=dtype,
        revision=revision,
        ignore_unexpected=ignore_unexpected,
        attn_implementation=attn_implementation,
        changes={name: value for name, value in options.items() if name not in of_swap},
    )
    moe_options = {name: value for name, value in options.items() if name in of_swap}
    return load_and_count(
        source,
        meshes,
        compute=compute,
        capacity=capacity,
        recompute=recompute,
        reshard_after_forward=reshard_after_forward,
        impl=impl,
        device=device,
        moe_options=moe_options,
        adapter=adapter,
        quantize=quantize,
        pipeline=pipeline,
    )[0]


@dataclass(frozen=True)
class Source:
    """A checkpoint of transformers, and how to read it. See :func:`load_pretrained`."""

    path: str | Path
    dtype: torch.dtype | None = None
    revision: str | None = None
    ignore_unexpected: bool = False
    attn_implementation: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config that take the place of those in the file."""


def load_and_count(
    source: Source,
    meshes: Meshes,
    *,
    compute: ComputeOn = "dtensor",
    capacity: int | None = None,
    recompute: Recompute = "none",
    reshard_after_forward: bool = True,
    impl: Implementation | None = None,
    device: torch.device | str | None = None,
    moe_options: Mapping[str, Any] | None = None,
    adapter: Any = None,
    quantize: Format | None = None,
    pipeline: PipelineConfig | None = None,
) -> tuple[Any, int]:
    """The result of :func:`load_pretrained`, and the number of bytes that this rank has read from the files."""
    place = torch.device(device or meshes.device_type or "cpu")
    if meshes.device_type not in (None, place.type):
        raise ValueError(f"device: got {place}, but the meshes are on {meshes.device_type}; leave device out")
    with ExitStack() as stack:
        model: Any = None
        plain: Any = None
        state: dict[str, LazyTensor] = {}
        tensors: dict[str, LazyTensor] = {}
        stored: dict[str, Stored] | None = None
        files = Files()

        def describe() -> None:
            nonlocal plain, state, stored, files
            files = stack.enter_context(open_files(source.path, source.revision))
            config, found = read_changed_config(source), files.tensors
            packed = is_mxfp4(config)
            if packed:
                # It is transformers' quantizers that would read it.
                del config.quantization_config
            plain = empty_model(source, files, config)
            if packed:
                if quantize not in (None, FORMAT):
                    raise ValueError(f"quantize: got {quantize!r}, but {source.path} is {FORMAT} already; leave it out")
                found, stored = set_apart(source.path, found, plain.dtype)
            with damage_is_value_error(source.path):
                state = to_model_names(plain, found, cast=True, ignore_unexpected=source.ignore_unexpected)

        def build(untied: list[str]) -> None:
            nonlocal model, tensors
            ties.untie(plain, untied)
            make_buffers(plain, place)
            model = swap_moe(plain, impl=impl, **(moe_options or {}))
            tensors = to_our_names(model, ties.without_copies(plain, state))
            if stored is not None:
                quantize_(model, FORMAT)
                tensors |= to_our_parts(model, stored)
            elif quantize is not None:
                quantize_(model, quantize)
            if adapter is not None:
                part_with_peft("load").prepare_adapters(model, adapter)

        # A failure is shared, so that no rank waits for one that cannot read the files.
        ranks.together(describe)
        untied = ranks.on_leader(lambda: ties.differing(plain, state))
        ranks.together(lambda: build(untied))
        if meshes.pp_size > 1:
            model = split_into_stages(model, meshes, pipeline)
        parallelize(
            model,
            meshes,
            compute=compute,
            capacity=capacity,
            recompute=recompute,
            reshard_after_forward=reshard_after_forward,
        )
        if not meshes.is_distributed:
            materialize(model, place)
        ranks.together(lambda: fill(model, tensors))
        if adapter is not None:
            part_with_peft("load").finish_adapters(model, adapter)
        _log.info("%s: rank %d read %d bytes", source.path, ranks.rank(), files.bytes_read)
        return model.eval(), files.bytes_read


def empty_model(source: Source, files: Files, config: Any = None) -> Any:
    """The transformers model of a checkpoint, on the meta device. Each parameter has the dtype that it will have.

    ``config`` is that of :func:`read_changed_config`, if it has been read.

    Raises:
        ValueError: the weights are quantized.
        TypeError: the config does not have one of the values that are to be changed.
    """
    path, revision = source.path, source.revision
    config = read_changed_config(source) if config is None else config
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path} is quantized (quantization_config); dequantize it with transformers first")
    floats = (tensor.dtype for tensor in files.tensors.values() if tensor.dtype.is_floating_point)
    chosen: Any = source.dtype or config.dtype or next(floats, torch.get_default_dtype())
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 < layers <= len(files.tensors):
        raise ValueError(f"{path}: num_hidden_layers is {layers}, but the files have {len(files.tensors)} tensors")
    with damage_is_value_error(f"{path}: {CONFIG_NAME}", vars(config)):
        model = model_on_meta(config, chosen, source.attn_implementation)
    # Not every checkpoint has one. Without it the model keeps its default.
    if (generation := read_generation_config(path, revision)) is not None:
        model.generation_config = generation
    return model


def empty_model_and_tensors(source: Source, files: Files) -> tuple[Any, Mapping[str, LazyTensor]]:
    """The result of :func:`empty_model`, and the tensors of the files. Experts in MXFP4 are decoded as they are read.

    Raises:
        ValueError, TypeError: as :func:`empty_model`; or what is stored as MXFP4 does not fit the format.
    """
    config = read_changed_config(source)
    packed = is_mxfp4(config)
    if packed:
        del config.quantization_config
    plain = empty_model(source, files, config)
    if not packed:
        return plain, files.tensors
    others, stored = set_apart(source.path, files.tensors, plain.dtype)
    return plain, others | {name: decoded(weight, plain.dtype) for name, weight in stored.items()}


def read_changed_config(source: Source) -> Any:
    """The config of a checkpoint, with the values that take the place of those in the file.

    Raises:
        TypeError: the config does not have one of these values.
    """
    config, unknown = read_config(source.path, source.revision, **source.changes)
    # Where the language model is a part of the whole, its config is a part too.
    text = config.get_text_config()
    if other := sorted(name for name in unknown if not hasattr(text, name)):
        known = [
            *inspect.signature(load_pretrained).parameters,
            *inspect.signature(swap_moe).parameters,
            *text.to_dict(),
        ]
        owners = f"load_pretrained, swap_moe and {type(text).__name__}"
        raise TypeError(f"{other[0]}: {owners} have no such option; {nearest(other[0], known)}")
    for name, value in unknown.items():
        setattr(text, name, value)
    return config


def model_on_meta(config: Any, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> Any:
    """A causal language model on the meta device. What transformers keeps in fp32 is in fp32 here too."""
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **attention)
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    return model


@torch.no_grad()
def make_buffers(model: Any, device: torch.device) -> None:
    """Fill the buffers of a model on the meta device that are in no file, as transformers initialises them.

    Raises:
        ValueError: transformers does not initialise one of them; the message names it.
    """
    made = [name for name, _ in model.named_non_persistent_buffers()]
    for name in made:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._buffers[leaf] = torch.full_like(owner._buffers[leaf], _UNSET, device=device)
    for tensor in model.state_dict(keep_vars=True).values():
        # transformers does not initialise what has this mark.
        tensor._is_hf_initialized = True
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    for name in made:
        if bool((model.get_buffer(name) == _UNSET).any()):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is in no file, and transformers does not initialise it; use "
                "from_pretrained and swap_moe to load this model"
            )


def to_our_names(model: nn.Module, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The state of a model with swapped layers, from the state of the model before the swap."""
    ours: dict[str, Any] = dict(state)
    for prefix, module in model.named_modules():
        if (origin := origin_of(module)) is not None:
            for link in origin.links:
                parts = link.split(ours.pop(f"{prefix}.{link.theirs}"))
                ours |= {f"{prefix}.{name}": part for name, part in zip(link.ours, parts, strict=True)}
    return ours


def part_with_peft(name: str) -> Any:
    """A module of the integration of peft, which is optional and knows this one.

    Raises:
        ValueError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need the package peft: pip install '.[lora]' in a checkout of moesaic")
    return importlib.import_module(f"moesaic.integrations.peft.{name}")


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> None:
    """Read this rank's part of every parameter and every persistent buffer. Adapters are left as they are."""
    names = names_in_whole(model)
    # Of weights that are tied the first is read.
    shared = model.shared if isinstance(model, Stages) else None
    tied = {} if shared is None else {name_without_wrappers(shared[1]): name_without_wrappers(shared[0])}
    state = model.state_dict(keep_vars=True)
    filled = set(map(id, fill_packed(model, tensors)))
    for name, tensor in state.items():
        plain = name_without_wrappers(names[name])
        plain = tied.get(plain, plain)
        if plain in tensors:
            local, box = local_part(tensor)
            tensors[plain].read_into(local, box)
            filled.add(id(tensor))
    left = [n for n, t in state.items() if id(t) not in filled and not is_of_adapter(n)]
    assert not left, f"nothing was read for {left}"
