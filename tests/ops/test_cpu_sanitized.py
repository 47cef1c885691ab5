"""The C entry points under address and undefined-behaviour sanitizers, between unreadable pages; and the headers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
STANDARD = "-std=c++20"
SANITIZED = ["-O1", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The files of an instruction set, and the flags that the build gives them.
_PER_FILE = re.compile(r"set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS \"([^\"]*)\"\)")
# What such a file defines before it includes the kernels.
_DEFINED = re.compile(r"#define (\w+) (.+)")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def _flags_of_instruction_sets() -> dict[str, list[str]]:
    build = (SOURCES / "CMakeLists.txt").read_text()
    avx512 = re.search(r"set\(AVX512 ([^)]*)\)", build)[1].replace(" ", ";")
    flags = {name: options.replace("${AVX512}", avx512).split(";") for name, options in _PER_FILE.findall(build)}
    assert set(flags) == {file.name for file in SOURCES.glob("isa_*.cpp")}
    return flags


def _knows_amx() -> bool:
    program = 'int main() { asm volatile("tilerelease"); }'
    return subprocess.run(["g++", "-x", "c++", "-c", "-o", os.devnull, "-"], input=program, text=True).returncode == 0


def _compile(commands: list[list[str]]) -> None:
    compilers = [
        subprocess.Popen(["g++", STANDARD, "-w", *command], stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for compiler in compilers:
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors


# `make test-isa` runs it: the sanitizers' code takes long to compile.
@pytest.mark.long
def test_random_problems(tmp_path):
    flags = _flags_of_instruction_sets()
    files = [*SOURCES.glob("*.cpp"), ROOT / "tests" / "csrc" / "fuzz.cpp"]
    options = [*SANITIZED, "-DMOESAIC_WITH_AMX"]
    if not _knows_amx():
        files.remove(SOURCES / "isa_amx.cpp")
        options = SANITIZED
    _compile([[*options, *flags.get(file.name, []), "-c", file, "-o", tmp_path / f"{file.stem}.o"] for file in files])
    program = tmp_path / "fuzz"
    subprocess.run(["g++", *SANITIZED, *tmp_path.glob("*.o"), "-o", program], check=True)
    done = subprocess.run([program, "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ok\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
@pytest.mark.parametrize("answer", ["yes", "no"])
def test_without_permission_there_are_no_tiles(tmp_path, answer):
    program = tmp_path / "tile_permission"
    _compile([["-O0", ROOT / "tests" / "csrc" / "tile_permission.cpp", "-o", program]])
    done = subprocess.run([program, answer], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.slow
def test_headers_stand_alone():
    commands = {}
    for name, flags in _flags_of_instruction_sets().items():
        defined = dict(_DEFINED.findall((SOURCES / name).read_text()))
        options = [*flags, *(f"-D{key}={value}" for key, value in defined.items()), "-fsyntax-only", "-x", "c++"]
        # A header of vectors is for the instruction sets that name it; any set will do for the others.
        vector = defined["MOESAIC_VECTOR"].strip('"')
        for header in SOURCES.glob("*.h*"):
            if header.name == vector or not header.name.startswith("vector_"):
                commands.setdefault(header, [*options, header])
    assert set(commands) == set(SOURCES.glob("*.h*"))
    _compile(list(commands.values()))
