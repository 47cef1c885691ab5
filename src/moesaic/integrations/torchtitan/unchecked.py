"""Our code where torchtitan checks the placements of tensors, ``--debug.spmd_typechecking``."""

import contextlib

import spmd_types


def unchecked() -> contextlib.AbstractContextManager[None]:
    """Code inside is not checked. torchtitan gives the results of its ``local_map`` regions the types it declares.

    Our exchange and our operators are unknown to it, and what they do with ranks is tested elsewhere.
    """
    # Asked first: compiled code, which is never checked, could not enter the other context.
    return spmd_types.no_typecheck() if spmd_types.is_type_checking() else contextlib.nullcontext()
