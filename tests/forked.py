"""Run a program in a process forked from the server of `tests.distributed.pool`, which has imported torch and moesaic.

That saves the seconds which a new interpreter takes to import them.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distributed.pool import start_server


def run_forked(program: str | Path, *args: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run code, or a file, as `__main__`.

    Args:
        program: the code, or the path of a file.
        args: what the program finds in `sys.argv`.
        timeout_s: after this many seconds it is killed.

    Returns:
        Its exit status and what it printed.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=(program, args, dict(os.environ), out, err)
        )
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
        said = [file.read_text() if file.exists() else "" for file in (out, err)]
    assert process.exitcode is not None
    return subprocess.CompletedProcess([str(program), *args], process.exitcode, *said)


def _main(program: str | Path, args: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    for file, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    os.environ.update(environment)
    sys.argv = [str(program) if isinstance(program, Path) else "-c", *args]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
