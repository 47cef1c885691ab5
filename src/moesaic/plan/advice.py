"""What the numbers say, in sentences: whether ETP pays for this model, and what would make it fit."""

from dataclasses import replace

from moesaic.parallel.mesh import resolve_layout
from moesaic.plan.choice import Job
from moesaic.plan.load import load_of
from moesaic.plan.model import Planned
from moesaic.plan.search import Found, Machines, Plan, search
from moesaic.plan.time import cost_of


def ep_or_etp(planned: Planned, best: Plan, job: Job, machines: Machines) -> str:
    """Compares the best plan with one that has the same ranks of experts, in the other form."""
    layout, shapes = best.choice.layout, planned.shapes
    moe = next((layer.moe for layer in shapes.layers if layer.moe is not None), None)
    ranks = layout.ep * layout.etp
    if moe is None or ranks == 1:
        return "Experts are whole on every rank here: neither EP nor ETP sends anything."
    tokens = best.choice.tokens(job)
    said = []
    for ep, etp in _forms(ranks, moe.num_experts, moe.hidden_dim, machines.per_node):
        sizes = {**layout.of_view("dense"), "pp": layout.pp, "ep": ep, "etp": etp}
        other = replace(best.choice, layout=resolve_layout(layout.world_size, **sizes))
        seconds = cost_of(shapes, other, job, machines.hardware, machines.dtype, machines.per_node).time.total
        load = load_of(tokens, moe, other.layout, job.capacity)
        rows = (load.away + (etp - 1) * load.received) / tokens
        said.append((seconds, f"ep {ep} x etp {etp}: {rows:.1f} rows a token sent there, {seconds:.2f} s a step"))
    (first, a), *rest = sorted(said)
    others = "; ".join(text for _, text in rest[:2])
    pays = "ETP pays" if "etp 1:" not in a else "EP pays"
    if not rest:
        return f"{a}: the only form that {ranks} ranks of experts can have within a node."
    return (
        f"{pays} here, {rest[0][0] / first:.2f} times as fast as the next form. Of {ranks} ranks of experts: {a}; "
        f"{others}. EP sends a row to each rank that has one of a token's {moe.top_k} experts, and ETP to all ranks "
        "that share an expert: ETP pays where experts are few and wide, or a token goes to most ranks anyway."
    )


def _forms(ranks: int, experts: int, hidden: int, per_node: int) -> list[tuple[int, int]]:
    pairs = [(ranks // etp, etp) for etp in range(1, min(ranks, per_node) + 1) if ranks % etp == 0]
    return [(ep, etp) for ep, etp in pairs if ep <= experts and etp <= hidden and experts % ep == 0]


def what_would_fit(planned: Planned, found: Found, job: Job, machines: Machines) -> str:
    """Why nothing fits, what is nearest, and how many devices would do."""
    if found.tried == 0:
        return (
            f"there is no legal layout of {machines.gpus} devices for {job.batch} sequences of {job.seq_len} tokens a "
            "step: --batch has to be a multiple of the dp ranks, and a stage needs a layer; change --gpus or --batch"
        )
    nearest = found.nearest
    if nearest is None:
        return f"none of {found.tried} legal layouts fits into {machines.memory / 1e9:.0f} GB"
    memory = nearest.memory
    text = (
        f"none of {found.tried} legal layouts fits into {machines.memory / 1e9:.0f} GB. The nearest needs "
        f"{memory.total / 1e9:.1f} GB: {nearest.choice}. It has {memory.weights / 1e9:.1f} GB of weights, "
        f"{memory.gradients / 1e9:.1f} of gradients, {memory.optimizer / 1e9:.1f} of optimizer states, "
        f"{memory.activations / 1e9:.1f} of activations and {(memory.gathered + memory.working) / 1e9:.1f} in use"
    )
    for times in (2, 4, 8):
        more = replace(machines, gpus=times * machines.gpus)
        if job.batch % times == 0 and search(planned, job, more, top=1).plans:
            return f"{text}. It would fit --gpus {more.gpus}"
    return f"{text}. Give --memory {memory.total / 1e9 + 0.5:.0f} or more, or far more --gpus"
