"""experts_lora of quantised weights (QLoRA): what it is with the decoded weights."""

import pytest
import torch

from moesaic.ops.quantized import quantize
from tests.ops.test_experts_lora import computed, errors, problem

IDS = torch.randint(-1, 4, (40, 2), generator=torch.Generator().manual_seed(2))
WEIGHTS = ("w1", "w3", "w2")


# Many small operators: with all formats and forms it takes long.
CASES = [(format, full) for format in ("int8", "nf4", "mxfp4") for full in (True, False)]


@pytest.mark.parametrize(
    ("format", "full"),
    [case if case == ("nf4", True) else pytest.param(*case, marks=pytest.mark.long) for case in CASES],
)
def test_it_is_that_of_the_decoded_weights(format, full):
    """With and without gate and biases."""
    p = problem(IDS, 4, (64, 64, 3), full, full, share=True)
    packed = {name: quantize(p[name].float(), format) for name in WEIGHTS if p[name] is not None}
    decoded = {name: torch.stack([w[e] for e in range(4)]).double() for name, w in packed.items()}
    truth = computed(p | decoded, impl="summed")
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        assert max(errors(computed(p | packed, dtype), truth)) < most
    reference = computed(p | packed, torch.float32, "reference")
    assert max(errors(reference, truth)) < 1e-5


def test_no_token_and_idle_experts():
    p = problem(IDS[:0], 4, (64, 64, 3), biased=False)
    p |= {name: quantize(p[name].float(), "nf4") for name in WEIGHTS}
    assert [t.shape[0] for t in computed(p)[:2]] == [0, 0]
    alone = problem(torch.full((5, 1), 2), 4, (64, 64, 3), biased=False)
    alone |= {name: quantize(alone[name].float(), "nf4") for name in WEIGHTS}
    for factor in computed(alone)[3:]:
        assert factor[[0, 1, 3]].count_nonzero() == 0
        assert factor[2].count_nonzero()


def test_mistakes_are_named():
    p = problem(IDS, 4, (64, 64, 3))
    with pytest.raises(TypeError, match="w2: w1 are quantised, and this is not; quantise all weights, or none"):
        computed(p | {"w1": quantize(p["w1"].float(), "nf4")})
