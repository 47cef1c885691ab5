"""Where transformers takes what others register: experts, and how tokens come to them."""

from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ExpertsInterface

from moesaic.integrations.transformers import ignored
from moesaic.integrations.transformers.expert_parallel import MoesaicEP
from moesaic.integrations.transformers.experts import experts_forward

NAME = "moesaic"


def register() -> None:
    """Make ``"moesaic"`` known to transformers: our kernels, and our expert parallelism. A second call does nothing.

    Call it in every process, before the model is made or loaded. Each argument of transformers works without the other:

    ``experts_implementation="moesaic"`` computes experts with our operators. It supports all that the interface
    describes: concatenated or interleaved gate and up projections, transposed weights, biases, a module's own
    ``_apply_gate``, experts without a gate, a norm after the experts, and the ids that transformers' expert parallelism
    gives to experts of other ranks. Weights are read in place, through strided views.

    ``DistributedConfig(ep_size=..., ep_implementation="moesaic")`` does that, and brings tokens to the ranks of their
    experts: once to each rank, and their results come back summed.

    Experts with the common gate ``act(gate) * up`` or with none, and with an activation of :func:`moesaic.experts_mlp`,
    run as that one operator. So do the experts of gpt-oss. Other experts run as two :func:`moesaic.grouped_mm` and the
    module's own functions. In gpt-oss the columns of gate and up projection alternate in one matrix. The ``cpu`` and
    ``triton`` kernels read them in place; ``triton`` then has half the speed that it has on adjacent columns.
    ``torch`` copies them in every call.

    Models whose experts do not use the interface ignore ``experts_implementation``, ours as well as those of
    transformers. A warning says so (Llama-4, Doge, JetMoe, LongCat-Flash, Step-3.7). For Llama-4 use :func:`swap_moe`.

    Example:
        >>> moesaic.integrations.transformers.register()
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", experts_implementation="moesaic")
        >>> model.set_experts_implementation("eager")  # and back
        >>> config = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="moesaic")  # on each of 4 ranks
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", distributed_config=config)
    """
    ExpertsInterface.register(NAME, experts_forward)
    EPImplementationInterface.register(NAME, MoesaicEP)
    ignored.watch(NAME)
