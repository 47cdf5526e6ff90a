"""An op is added by writing the files that CONTRIBUTING.md names, and nothing else.

Into a copy of the tree go the files of ``tests/templates/scale_add``; then it is built, and the
tests of rooms, ``explain``, ``bigkernel bench`` and the op's own tests run there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "tests" / "templates" / "scale_add"
FILES = sorted(path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file())


def test_an_op_is_few_files_and_changes_none():
    assert 1 <= len(FILES) <= 6
    assert not [file for file in FILES if (ROOT / file).exists()]


@pytest.mark.slow  # builds the CPU kernels anew: minutes
def test_an_op_is_added_by_its_files_alone(tmp_path):
    tree = tmp_path / "tree"
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for file in (ROOT / name for name in tracked):
        if file.exists():
            there = tree / file.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, there)
    shutil.copytree(TEMPLATE, tree, dirs_exist_ok=True)
    shutil.rmtree(tree / "tests" / "templates")
    environment = os.environ | {"BIGKERNEL_CUDA": "0", "PYTHONPATH": str(tree)}

    def run(*command: str) -> str:
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-4000:]
        return ran.stdout

    run("setup.py", "--quiet", "build_ext", "--inplace")
    said = run("-c", "import bigkernel; print(bigkernel.explain('scale_add'))")
    assert said.startswith("scale_add: cpu (")
    assert "it is an example" in run(
        "-c", "from bigkernel import backend; print(backend.decide('scale_add', 'cuda')[1])"
    )
    assert "op scale_add on cpu" in run("-m", "bigkernel", "env")
    run("-m", "pytest", "-q", "-n", "0", "tests/test_rooms.py", "tests/ops/test_scale_add.py")
    assert "torch.add" in run("-m", "bigkernel", "bench", "scale_add", "--quick")
