"""Importing moesaic: what it needs, what it leaves alone, what it offers."""

import json

OPTIONAL = ["triton", "transformers", "datasets", "tensorboard", "tokenizers", "matplotlib"]

_BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)

sys.meta_path.insert(0, Blocker())
"""

_DESCRIBE = f"""
import json, sys
import moesaic

missing = [name for name in moesaic.__all__ if not hasattr(moesaic, name)]
# torch imports triton itself, where it is installed.
loaded = sorted((set({OPTIONAL!r}) - {{"triton"}} | {{"moesaic.ops.triton.matmul"}}) & set(sys.modules))
print(json.dumps({{"all": moesaic.__all__, "missing": missing, "loaded": loaded}}))
"""


def test_works_without_any_optional_package(fresh_python):
    said = json.loads(fresh_python(_BLOCK + _DESCRIBE).stdout)
    assert said["missing"] == []
    assert 0 < len(said["all"]) <= 15
    assert len(set(said["all"])) == len(said["all"])


def test_the_blocker_blocks(fresh_python):
    fresh_python(_BLOCK + "try: import transformers\nexcept ModuleNotFoundError: pass\nelse: sys.exit(1)")


def test_does_not_import_optional_packages_that_are_there(fresh_python):
    said = json.loads(fresh_python(_DESCRIBE).stdout)
    assert said["loaded"] == []
