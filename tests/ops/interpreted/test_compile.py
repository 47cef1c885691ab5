"""torch.compile(fullgraph=True) of the operators with ``impl="triton"``."""

import pytest

from tests.ops import compiled


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_one_graph_gives_the_eager_bits():
    compiled.main("triton")
