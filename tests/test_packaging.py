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
    """Both ways to make a wheel leave it out."""
    for text in (project()["tool"]["cibuildwheel"]["repair-wheel-command"], (ROOT / "Makefile").read_text()):
        assert "auditwheel repair --exclude libgomp.so.1 " in text


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
def sdist(checkout):
    """The sdist, unpacked; its archive is in `dist/` of the checkout."""
    build = [BIN / "python", "-m", "build", "--no-isolation", "--sdist", "-o", "dist", "."]
    call(*build, cwd=checkout, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MOESAIC="9.8.7")
    shutil.unpack_archive(checkout / "dist" / "moesaic-9.8.7.tar.gz", checkout / "unpacked")
    return checkout / "unpacked" / "moesaic-9.8.7"


@pytest.fixture(scope="module")
def environment(sdist, tmp_path_factory):
    """A new environment with what `pip install .` brings, without extras and without git; its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    call(*pip, "install", "-q", "-c", "constraints.txt", ".", cwd=sdist, MOESAIC_REQUIRE_CPU_KERNELS="1")
    call(*pip, "check")
    return folder / "bin"


@pytest.mark.long
def test_an_index_takes_wheel_and_sdist(checkout, sdist, tmp_path):
    build = [BIN / "python", "-m", "build", "--no-isolation", "--wheel", "-o", "built", "."]
    call(*build, cwd=sdist, MOESAIC_REQUIRE_CPU_KERNELS="1")
    [built] = (sdist / "built").glob("*.whl")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    call(BIN / "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", checkout / "dist", built, PATH=path)
    [wheel] = (checkout / "dist").glob("*.whl")
    assert re.fullmatch(r"moesaic-9\.8\.7-py3-none-manylinux[\w.]+_x86_64\.whl", wheel.name)
    assert "PASSED" in call(BIN / "twine", "check", "--strict", *(checkout / "dist").iterdir())
    with zipfile.ZipFile(wheel) as opened:
        libraries = [name for name in opened.namelist() if ".so" in name]
        assert libraries == ["moesaic/ops/libmoesaic_cpu.so"]
        opened.extract(libraries[0], tmp_path)
    needed = re.findall(r"Shared library: \[(.*?)\]", call("readelf", "-d", tmp_path / libraries[0]))
    assert "libgomp.so.1" in needed


@pytest.mark.long
def test_the_programs_of_the_readme_run_in_an_empty_environment(environment, tmp_path):
    assert call(environment / "moesaic", "--version", cwd=tmp_path) == "moesaic 9.8.7\n"
    assert "CPU kernels: none" not in call(environment / "moesaic", "info", cwd=tmp_path)
    starts = {"one_process.py": ["python"], "four_ranks.py": ["torchrun", "--nproc-per-node", "4"]}
    losses = []
    for name, (program, *options) in starts.items():
        (tmp_path / name).write_text(BY_FILE[name].code)
        printed = call(environment / program, *options, name, cwd=tmp_path, OMP_NUM_THREADS="1")
        losses.append(float(printed.split()[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (tmp_path / "mylib.py").write_text(BY_FILE["mylib.py"].code)
    said = call(environment / "moesaic", "prove", "mylib:grouped_gemm", "--inputs", "mylib:inputs", cwd=tmp_path)
    assert "nothing wrong, nothing missing" in said


@pytest.mark.long
def test_the_tests_of_the_sdist_run(environment, sdist):
    """Some of them, on the package that was installed from it."""
    needed = [need for need in project()["project"]["optional-dependencies"]["test"] if "moesaic" not in need]
    call(environment / "python", "-m", "pip", "install", "-q", "-c", "constraints.txt", *needed, cwd=sdist)
    some = ["tests/test_house.py", "tests/test_imports.py", "tests/ops/test_native.py", "tests/layers/test_router.py"]
    said = call(environment / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *some, cwd=sdist)
    assert re.search(r"\d+ passed", said)


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
