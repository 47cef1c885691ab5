"""What a release would publish: a wheel that PyPI takes, an sdist whose tests run, an install from nothing.

The long tests build from a copy of this checkout. `make wheel` does the same into `dist/`.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_examples import BY_FILE

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OTHER_PYTHONS = ("3.12", "3.13")


def call(*command, cwd=ROOT, **environment):
    """Run a command without this process's paths; give back what it printed."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOESAIC_CPU_ISA")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=own | environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_wheel_never_brings_a_second_openmp():
    """Both ways to make a wheel leave it out, and link C++'s library in."""
    config, makefile = project()["tool"]["cibuildwheel"], (ROOT / "Makefile").read_text()
    [option] = config["config-settings"]
    for text in (config["repair-wheel-command"], makefile):
        assert "auditwheel repair --exclude libgomp.so.1 " in text
    assert f"-C {option}=ON" in makefile
    assert f"option({option.removeprefix('cmake.define.')} " in (ROOT / "csrc" / "CMakeLists.txt").read_text()


def test_no_text_installs_moesaic_from_an_index():
    """Nobody has put it there, and whoever takes the name could."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")]
    wrong = re.compile(r"pip install (?:-\S+ )*['\"]?moesaic(?:\[[\w,]+\])?['\"]?(?!\S* @)(?=[\s'\"`.,;)]|$)")
    assert [f"{text.relative_to(ROOT)}: {m[0]}" for text in texts for m in wrong.finditer(text.read_text())] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files of git without their history, as a tarball has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def released(checkout):
    """A folder with the sdist, unpacked, and the wheel that is built from it."""
    build = [BIN / "python", "-m", "build", "--no-isolation"]
    call(*build, "--sdist", "-o", "dist", ".", cwd=checkout, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MOESAIC="9.8.7")
    shutil.unpack_archive(checkout / "dist" / "moesaic-9.8.7.tar.gz", checkout / "unpacked")
    sdist = checkout / "unpacked" / "moesaic-9.8.7"
    wheel = [*build, "--wheel", "-C", "cmake.define.MOESAIC_STATIC_CXX=ON", "-o", "built", "."]
    call(*wheel, cwd=sdist, MOESAIC_REQUIRE_CPU_KERNELS="1")
    [built] = (sdist / "built").glob("*.whl")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    call(BIN / "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", checkout / "dist", built, PATH=path)
    return checkout


@pytest.mark.long
def test_the_wheel_is_one_that_an_index_takes(released, tmp_path):
    [wheel] = (released / "dist").glob("*.whl")
    assert re.fullmatch(r"moesaic-9\.8\.7-py3-none-manylinux[\w.]+_x86_64\.whl", wheel.name)
    assert "PASSED" in call(BIN / "twine", "check", "--strict", *(released / "dist").iterdir())
    with zipfile.ZipFile(wheel) as opened:
        libraries = [name for name in opened.namelist() if ".so" in name]
        assert libraries == ["moesaic/ops/libmoesaic_cpu.so"]
        opened.extract(libraries[0], tmp_path)
    needed = re.findall(r"Shared library: \[(.*?)\]", call("readelf", "-d", tmp_path / libraries[0]))
    assert "libgomp.so.1" in needed
    assert not any("stdc++" in name for name in needed)


@pytest.mark.long
def test_the_tests_of_the_sdist_run(released):
    folder = released / "unpacked" / "moesaic-9.8.7"
    [wheel] = (released / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extract("moesaic/ops/libmoesaic_cpu.so", folder / "src")
    some = ["tests/test_docs.py", "tests/test_house.py", "tests/ops/test_native.py", "tests/layers/test_router.py"]
    path = os.pathsep.join([str(folder / "src"), str(folder)])
    said = call(BIN / "python", "-S", "-c", RUN_TESTS, path, *some, cwd=folder)
    assert re.search(r"\d+ passed", said)


# An editable install of this checkout must not come first, nor its finder.
RUN_TESTS = """
import os, site, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
os.environ["PYTHONPATH"] = sys.argv[1]
site.main()
sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in type(finder).__name__]
import moesaic, pytest
assert moesaic.__file__.startswith(sys.argv[1].split(os.pathsep)[0]), moesaic.__file__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.long
def test_a_checkout_installs_into_an_empty_environment(checkout, tmp_path):
    """`pip install .`, without extras and without git; then the README's programs."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    call(
        python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", checkout, MOESAIC_REQUIRE_CPU_KERNELS="1"
    )
    call(python, "-m", "pip", "check")
    bin_folder = python.parent
    assert call(bin_folder / "moesaic", "--version", cwd=tmp_path).startswith("moesaic 0.1.dev0")
    assert "CPU kernels: none" not in call(bin_folder / "moesaic", "info", cwd=tmp_path)
    printed = []
    for name, start in (
        ("one_process.py", [python]),
        ("four_ranks.py", [bin_folder / "torchrun", "--nproc-per-node", 4]),
    ):
        (tmp_path / name).write_text(BY_FILE[name].code)
        printed.append(call(*start, name, cwd=tmp_path, OMP_NUM_THREADS="1"))
    assert float(printed[0].split()[0]) == pytest.approx(float(printed[1].split()[0]), rel=1e-5)
    (tmp_path / "mylib.py").write_text(BY_FILE["mylib.py"].code)
    said = call(bin_folder / "moesaic", "prove", "mylib:grouped_gemm", "--inputs", "mylib:inputs", cwd=tmp_path)
    assert "nothing wrong, nothing missing" in said


@pytest.mark.long
@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_another_python_compiles_all_files(version, tmp_path):
    """No torch for it is at hand in CI, so this is its compiler, and a type check for that version."""
    assert f"Programming Language :: Python :: {version}" in project()["project"]["classifiers"]
    call(BIN / "pyrefly", "check", "--python-version", version, "--python-interpreter-path", sys.executable)
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode != 0:
        pytest.skip(f"there is no python{version}")
    call(found, "-W", "error", "-m", "compileall", "-q", "src", "tests", PYTHONPYCACHEPREFIX=str(tmp_path))
