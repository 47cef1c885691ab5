"""What ranks of these tests need imported, beside what all ranks do; the fork server imports it once."""

from tests.torchtitan import cpu

cpu.install()

import torchtitan.experiments  # noqa: E402
import torchtitan.trainer  # noqa: E402, F401

import tests.torchtitan.models  # noqa: E402, F401
