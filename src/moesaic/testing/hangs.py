"""Where a rank waits: the collective and the line that called it, read from its stack."""

import re
from pathlib import Path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
# Frames within torch that say nothing of what was called.
_WRAPPERS = ("wrapper", "inner", "__call__", "_call_impl", "_wrapped_call_impl", "decorate_context", "_fn")


def where(stack: str) -> str:
    """In a few words: ``in all_reduce, called from model.py:12 in forward``. ``stack`` has the innermost call first."""
    frames = [match.groupdict() for match in _FRAME.finditer(stack)]
    collective = None
    for frame in frames:
        inside = "/torch/distributed/" in frame["file"] or frame["file"].endswith("/torch/_ops.py")
        if inside and frame["name"] not in _WRAPPERS:
            collective = collective or frame["name"]
            # The outermost in a row is what was asked for, such as all_gather_tensor rather than its wait.
            if "/torch/distributed/" in frame["file"]:
                collective = frame["name"]
        elif collective and not inside:
            break
    caller = next((f for f in frames if "/torch/" not in f["file"] and "/moesaic/testing/" not in f["file"]), None)
    said = f"waiting in {collective}" if collective else "not in a collective"
    if caller is None:
        return said
    return f"{said}, called from {Path(caller['file']).name}:{caller['line']} in {caller['name']}"
