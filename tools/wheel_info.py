"""Says what was compiled into wheels, a line each, without installing them.

    python tools/wheel_info.py dist/*.whl

The note is bigkernel/build_info.json in the wheel; setup.py writes it.
"""

import json
import sys
import zipfile
from pathlib import Path

NOTE = "bigkernel/build_info.json"


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


def main(files: list[str]) -> int:
    """One line a wheel; 2 where none is named."""
    if not files:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    for name in files:
        print(f"bigkernel: {name} holds {contents(Path(name))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
