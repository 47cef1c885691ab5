"""Run a model for some steps, as the one process or as a rank, and record what came out."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic import ranks
from moesaic.testing.errors import CheckError
from moesaic.testing.layout import Layout
from moesaic.testing.noise import OtherOrder
from moesaic.testing.record import Check, Run, Step
from moesaic.testing.reference import Reference
from moesaic.testing.routing import Choice, Watch, tie_of

# What wrappers put into the names of parameters and modules.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")
SEED = 0


def run_reference(check: Check) -> Reference:
    """One process in fp64, and in the precision of the ranks: plainly, and with sums in another order."""
    exact = run(check, Layout(), dtype=check.exact)
    plain = run(check, Layout())
    ties = [tie_of(a, b) for a, b in zip(exact.choices, plain.choices, strict=True)]
    again = functools.partial(run, check, Layout(), forced=exact.choices, ties=ties)
    repeated = again()
    unsteady = [] if repeated.flips else changed(plain, repeated)
    with OtherOrder():
        other = again()
    return Reference(exact, repeated, other, ties, unsteady)


def run_shares(check: Check, layout: Layout) -> list[dict[str, Tensor | None]]:
    """The gradients that one process gets from the batch of each rank alone."""
    found = []
    for rank in range(layout.world):
        torch.manual_seed(SEED)
        model = check.build().to(check.exact)
        batch = check.inputs(rank, layout)
        batch = _prepared(batch[0] if isinstance(batch, list) else batch, check.exact)
        with Watch():
            given = (check.loss or default_loss)(model, batch)
            torch.stack([*(given.values() if isinstance(given, Mapping) else [given])]).sum().backward()
        found.append({plain_name(n): p.grad for n, p in model.named_parameters()})
    return found


def changed(one: Run, two: Run) -> list[str]:
    first, second = one.steps[0], two.steps[0]
    pairs = {"loss": (first.loss, second.loss), "output": (first.output, second.output)}
    pairs |= {f"gradient of {n}": (first.grads[n], second.grads[n]) for n in first.grads}
    return [n for n, (a, b) in pairs.items() if a is not None and b is not None and not torch.equal(a, b)]


def run_rank(
    check: Check, layout: Layout, max_norms: list[float], forced: list[list[Choice]], ties: list[float], trace: bool
) -> Run:
    """The same on this rank of a layout."""
    return run(check, layout, parallel=True, max_norms=max_norms, forced=forced, ties=ties, trace=trace)


def run(
    check: Check,
    layout: Layout,
    *,
    parallel: bool = False,
    dtype: torch.dtype | None = None,
    max_norms: list[float] | None = None,
    forced: list[list[Choice]] | None = None,
    ties: list[float] | None = None,
    trace: bool = True,
) -> Run:
    """Build the model, lay it out, and take ``check.steps`` steps."""
    torch.manual_seed(SEED)
    model = check.build()
    dtype = dtype or check.dtype
    if dtype is not None:
        model = model.to(dtype)
    if parallel:
        laid_out = check.parallelize(model, layout)
        model = model if laid_out is None else laid_out
    rank = dist.get_rank() if parallel else 0
    batch = check.inputs(rank, layout)
    batches = batch if isinstance(batch, list) else [batch] * check.steps
    if len(batches) != check.steps:
        raise CheckError(f"inputs: returned {len(batches)} batches for {check.steps} steps; return as many, or one")
    seen = Run(initial=_wholes(dict(_named(model.named_parameters()))), meshes=_meshes(model))
    optimizer = (check.optimizer or _sgd)([p for p in model.parameters() if p.requires_grad])
    for number, given in enumerate(batches):
        watch = Watch(
            forced=forced[number] if forced and number < len(forced) else (),
            tie=ties[number] if ties and number < len(ties) else 0.0,
        )
        with _outputs(model, seen if trace and number == 0 else None) as outputs:
            step = _one_step(check, model, _prepared(given, dtype), layout, parallel, watch, outputs)
        seen.choices.append(watch.choices)
        seen.dropouts += watch.dropouts if number == 0 else []
        seen.flips += watch.flips
        seen.steps.append(step)
        if check.clip is not None:
            if parallel:
                assert max_norms is not None
                norm = check.clip(model, max_norms[number])
                step.norm = None if norm is None else _whole(torch.as_tensor(norm)).detach().clone()
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), norm.item() / 2, norm)
                step.norm = norm.detach()
        optimizer.step()
        if check.after_step is not None:
            check.after_step(model)
        optimizer.zero_grad(set_to_none=True)
    seen.final = _wholes(dict(_named(model.named_parameters())))
    seen.buffers = _wholes(dict(_named(model.named_buffers())))
    if trace:
        seen.layers, seen.entering = _wholes(seen.layers), _wholes(seen.entering)
    return seen


def _one_step(
    check: Check,
    model: nn.Module,
    batch: Any,
    layout: Layout,
    parallel: bool,
    watch: Watch,
    outputs: list[Any],
) -> Step:
    floating = {n: t for n, t in tensors_of(batch).items() if t.requires_grad}
    parameters = {plain_name(n): p for n, p in model.named_parameters()}
    by_term: dict[str, dict[str, Tensor | None]] = {}
    with watch:
        if parallel and check.backward is not None:
            loss = torch.as_tensor(check.backward(model, batch, layout))
        else:
            given = (check.loss or default_loss)(model, batch)
            terms = dict(given) if isinstance(given, Mapping) else {}
            loss = torch.stack(list(terms.values())).sum() if isinstance(given, Mapping) else given
            if not parallel and len(terms) > 1:
                by_term = _by_term(terms, parameters)
            loss.backward()
    return Step(
        loss=_whole(loss.detach()).clone(),
        output=_whole_or_none(first_tensor(outputs[-1]) if outputs else None),
        inputs={n: t.detach().clone() for n, t in tensors_of(batch).items()},
        input_grads={n: _whole_or_none(t.grad) for n, t in floating.items()},
        grads=_wholes({n: p.grad for n, p in parameters.items() if p.requires_grad}),
        by_term=by_term,
    )


def _by_term(
    terms: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor | None]]:
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    found = {}
    for name, term in terms.items():
        grads = (
            torch.autograd.grad(term, list(trained.values()), retain_graph=True, allow_unused=True)
            if term.requires_grad
            else [None] * len(trained)
        )
        found[name] = dict(zip(trained, grads, strict=True))
    return found


def default_loss(model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
    """The ``.loss`` of the model's output; the balance loss in it apart, where it is as in transformers."""
    output = call(model, batch)
    read = output.get if isinstance(output, Mapping) else functools.partial(_attribute, output)
    loss, balance = read("loss"), read("aux_loss")
    if not isinstance(loss, Tensor):
        raise CheckError(
            f"loss: the output of the model, {type(output).__name__}, has no .loss; give loss=, a function of the "
            "model and the batch that returns a scalar"
        )
    config = getattr(getattr(model, "module", model), "config", None)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not isinstance(balance, Tensor) or not balance.requires_grad or not coefficient:
        return loss
    return {"main": loss - coefficient * balance, "balance": coefficient * balance}


def _attribute(output: Any, name: str) -> Any:
    return getattr(output, name, None)


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a mapping is its keyword arguments, a tuple its positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Linear in the gradient, so that rounding errors stay what they are. Tensors on several meshes rule foreach out.
    return torch.optim.SGD(parameters, lr=0.1, foreach=False)


def _prepared(batch: Any, dtype: torch.dtype | None) -> Any:
    """A copy whose floating tensors are leaves that ask for a gradient, in the dtype of the model."""

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        return value.to(dtype or value.dtype).requires_grad_() if value.is_floating_point() else value

    if isinstance(batch, Mapping):
        return {n: prepare(v) for n, v in batch.items()}
    return tuple(map(prepare, batch)) if isinstance(batch, tuple) else prepare(batch)


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by name, or by position."""
    named = batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else (batch,)))
    return {str(n): t for n, t in named.items() if isinstance(t, Tensor)}


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is about: its logits or last hidden state, or the first floating one."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = [v for n, v in output.items() if n != "loss"]
    found = map(first_tensor, output) if isinstance(output, (tuple, list)) else ()
    return next((t for t in found if t is not None), None)


def plain_name(name: str) -> str:
    """A name without what wrappers such as DDP and compile put in."""
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(wrapper, "")
    return name.removeprefix(_WRAPPERS[-1])


def _named(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((plain_name(name), t) for name, t in pairs)


@contextlib.contextmanager
def _outputs(model: nn.Module, trace: Run | None) -> Iterator[list[Any]]:
    """The outputs of the model; and, where ``trace`` is given, what passes each of its modules, by name and call."""
    outputs: list[Any] = []
    handles = [model.register_forward_hook(lambda _m, _a, output: outputs.append(output))]
    for name, module in model.named_modules():
        plain = plain_name(name).removesuffix("module")
        if trace is not None and plain:
            handles.append(module.register_forward_pre_hook(_marks_input(plain, trace)))
            handles.append(module.register_forward_hook(_keeps_output(plain, trace)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _marks_input(name: str, trace: Run) -> Callable[..., Any]:
    calls = itertools.count(1)

    def mark(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        at = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad), None)
        if at is None:
            return None
        # An alias of its own, so that the gradient is what this module alone gives.
        alias = args[at].view_as(args[at])
        key = _call(name, next(calls))
        alias.register_hook(lambda grad: trace.entering.__setitem__(key, grad.detach().clone()))
        return (*args[:at], alias, *args[at + 1 :])

    return mark


def _keeps_output(name: str, trace: Run) -> Callable[..., None]:
    calls = itertools.count(1)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if (tensor := first_tensor(output)) is not None:
            trace.layers[_call(name, next(calls))] = tensor.detach().clone()

    return keep


def _call(name: str, number: int) -> str:
    return name if number == 1 else f"{name} (call {number})"


def _wholes(tensors: Mapping[str, Tensor | None]) -> Any:
    """Plain copies, DTensors gathered. Collective: ranks may hold different names."""
    mine = {n: tuple(t.device_mesh.mesh.flatten().tolist()) for n, t in tensors.items() if isinstance(t, DTensor)}
    everyone = ranks.gather(mine)
    found: dict[str, Tensor | None] = {}
    # That several axes are gathered one after the other is no news here.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not all(name in everyone[r] for r in mine[name]):
            tensor = tensor.to_local()
        found[name] = _whole_or_none(tensor)
    return found


def _whole_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else _whole(t.detach()).clone()


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _meshes(model: nn.Module) -> dict[str, list[list[int]]]:
    """The ranks that each axis of a mesh of a parameter joins."""
    found: dict[str, list[list[int]]] = {}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names:
            mesh = parameter.device_mesh
            for dim, name in enumerate(mesh.mesh_dim_names or ()):
                found[name] = mesh.mesh.movedim(dim, -1).reshape(-1, mesh.size(dim)).tolist()
    return found
