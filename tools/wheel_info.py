"""Says what was compiled into wheels, a line each, without installing them; 1 if one is not right.

    python tools/wheel_info.py dist/*.whl

The note is bigkernel/build_info.json in the wheel; setup.py writes it. A wheel with native code
is for every Python 3 and for what manylinux_2_28 promises, and knows nothing of this machine.
"""

import json
import re
import runpy
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "bigkernel/build_info.json"
LIBRARY = "bigkernel/libbigkernel_ops.so"
LARGEST = 60 * 2**20  # bytes, with every architecture of GPUs in it
OLD_GLIBC = runpy.run_path(str(ROOT / "tools" / "old_glibc.py"))


def contents(wheel: Path) -> str:
    """One sentence: which kernels the wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        if NOTE not in archive.namelist():
            return f"no {NOTE}: built by something older than setup.py"
        note = json.loads(archive.read(NOTE))
    if not note["native"]:
        return "pure Python, nothing compiled"
    if note["cuda"] is None:
        return "CPU kernels; NO CUDA kernels"
    return f"CPU kernels and CUDA kernels (toolkit {note['cuda']}; {note['cuda_archs']})"


def folders_of_this_machine() -> list[str]:
    """What no file of a wheel may mention."""
    return [str(folder) for folder in (ROOT, Path.home(), sys.prefix, sys.base_prefix)]


def faults(wheel: Path, folders: list[str]) -> list[str]:
    """What is wrong with a wheel that setup.py made, a few words each."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        note = json.loads(archive.read(NOTE)) if NOTE in names else {"native": False}
        libraries = [name for name in names if re.search(r"\.so\b", name)]
        if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
            found.append("it has no LICENSE")
        for name in names:
            text = archive.read(name)
            told = [
                folder for folder in folders if re.search(rf"{re.escape(folder)}\b".encode(), text)
            ]
            found += [f"{name} mentions {folder}" for folder in told]
        if libraries != ([LIBRARY] if note["native"] else []):
            found.append(f"its libraries are {libraries}")
        elif note["native"]:
            with tempfile.TemporaryDirectory() as folder:
                found += OLD_GLIBC["too_new"](archive.extract(LIBRARY, folder))
    tag = r"-py3-none-manylinux_2_28_\w+\.whl$" if note["native"] else r"-py3-none-any\.whl$"
    if not re.search(tag, wheel.name):
        found.append(f"its name does not end with {tag}")
    if wheel.stat().st_size > LARGEST:
        found.append(f"it has {wheel.stat().st_size / 2**20:.1f} MiB, more than {LARGEST >> 20}")
    return found


def main(files: list[str]) -> int:
    """One line a wheel; 2 where none is named, 1 where one is not as it has to be."""
    if not files:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    wrong = 0
    for name in files:
        print(f"bigkernel: {name} holds {contents(Path(name))}.")
        for fault in faults(Path(name), folders_of_this_machine()):
            print(f"bigkernel: {name} is not right: {fault}", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
