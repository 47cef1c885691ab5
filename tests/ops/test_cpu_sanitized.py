"""The C entry points under address and undefined-behaviour sanitizers, between unreadable pages."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The files of an instruction set, and the flags that the build gives them.
_PER_FILE = re.compile(r"set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS \"([^\"]*)\"\)")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_random_problems(tmp_path):
    build = (SOURCES / "CMakeLists.txt").read_text()
    avx512 = re.search(r"set\(AVX512 ([^)]*)\)", build)[1].replace(" ", ";")
    flags = {name: options.replace("${AVX512}", avx512).split(";") for name, options in _PER_FILE.findall(build)}
    files = [*SOURCES.glob("*.cpp"), ROOT / "tests" / "csrc" / "fuzz.cpp"]
    assert set(flags) == {file.name for file in files if file.name.startswith("isa_")}
    compilers = [
        subprocess.Popen(
            ["g++", *FLAGS, "-w", *flags.get(file.name, []), "-c", file, "-o", tmp_path / f"{file.stem}.o"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for file in files
    ]
    for compiler in compilers:
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
    program = tmp_path / "fuzz"
    subprocess.run(["g++", *FLAGS, *tmp_path.glob("*.o"), "-o", program], check=True)
    done = subprocess.run([program, "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ok\n"
