"""The command line: `moesaic train ...`, or `python -m moesaic train ...` under a launcher; and others.

Exit status: 0 success, also when a signal made training save and stop; 1 training, a proof or a check failed; 2 the
call cannot work. Commands import what they need when they run, so that help is quick.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moesaic
from moesaic import ranks

# torchrun ends all ranks as soon as one has failed, and rank 0 may still be about to say why.
SECONDS_TO_SAY_WHY = 5.0


@dataclass(frozen=True)
class Command:
    """A sub-command: one line of help, and a function that takes its arguments and returns the exit status."""

    help: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default that of the process) and return the exit status.

    Under torchrun, ranks that fail wait until rank 0 has had time to print the error. torchrun ends them earlier.
    """
    status: object = 0
    try:
        status = _run(argv)
        return status
    except SystemExit as leaving:
        status = leaving.code
        raise
    finally:
        if status and not ranks.leads_launch() and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(SECONDS_TO_SAY_WHY)


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    leader = ranks.leads_launch()
    if not arguments or arguments[0] in ("-h", "--help"):
        if leader:
            print(_usage())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        if leader:
            print(f"moesaic {moesaic.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        if leader:
            print(f"moesaic: {name!r} is not a command\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name].run(rest)
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Drop what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    more = "moesaic COMMAND --help shows the options of a command.\nmoesaic --version prints the version."
    return f"usage: moesaic COMMAND [options]\n\n{rows}\n\n{more}"


def _train(arguments: Sequence[str]) -> int:
    from moesaic.train.command import run

    return run(arguments)


def _info(arguments: Sequence[str]) -> int:
    if arguments:
        print("usage: moesaic info\n\nShow versions, and the kernels that run on this machine.")
        return 0 if list(arguments) in (["-h"], ["--help"]) else 2
    from moesaic.info import lines

    try:
        print("\n".join(lines()))
    except ValueError as error:
        print(f"moesaic info: {error}", file=sys.stderr)
        return 2
    return 0


def _report(arguments: Sequence[str]) -> int:
    from moesaic.report.command import run

    return run(arguments)


def _eval(arguments: Sequence[str]) -> int:
    from moesaic.trained.eval_command import run

    return run(arguments)


def _generate(arguments: Sequence[str]) -> int:
    from moesaic.trained.generate_command import run

    return run(arguments)


def _tune(arguments: Sequence[str]) -> int:
    from moesaic.tune.command import run

    return run(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from moesaic.plan.command import run

    return run(arguments)


def _prove(arguments: Sequence[str]) -> int:
    from moesaic.sharding.proof.command import run

    return run(arguments)


def _check(arguments: Sequence[str]) -> int:
    from moesaic.testing.command import run

    return run(arguments)


def _convert(arguments: Sequence[str]) -> int:
    return _checkpoint_command("convert", arguments)


def _upcycle(arguments: Sequence[str]) -> int:
    return _checkpoint_command("upcycle", arguments)


def _checkpoint_command(name: str, arguments: Sequence[str]) -> int:
    try:
        from moesaic.integrations.transformers import command
    except ImportError as error:
        print(f"moesaic {name}: {error}", file=sys.stderr)
        return 2
    return {"convert": command.run_convert, "upcycle": command.run_upcycle}[name](arguments)


COMMANDS = {
    "check": Command("check that a parallel model has the gradients of one process", _check),
    "convert": Command("convert a transformers checkpoint to the format of moesaic train, or back", _convert),
    "eval": Command("measure a trained model, and how its routers spread the tokens", _eval),
    "generate": Command("let a trained model continue a text, or answer a message", _generate),
    "info": Command("show versions, and the kernels that run on this machine", _info),
    "plan": Command("find layouts of a model that fit into memory and are fast", _plan),
    "prove": Command("check the sharding rule of an operator on simulated ranks", _prove),
    "report": Command("write a page about runs, to open in a browser", _report),
    "train": Command("train a mixture-of-experts language model, on one process or many", _train),
    "tune": Command("measure which kernels are the fastest on this machine, and keep the choice", _tune),
    "upcycle": Command("turn a dense checkpoint into a mixture-of-experts checkpoint", _upcycle),
}
