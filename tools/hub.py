"""Lays bigkernel out as a kernel of Hugging Face's hub: `make hub`.

    python tools/hub.py [FOLDER]

FOLDER (build/hub) is then what a repository of the hub holds, or LOCAL_KERNELS names::

    README.md                         the card
    build/<variant>/__init__.py       bigkernel/hub, the kernel itself
                    metadata.json     its name, backend and the digests of its files
                    ..                what it imports of the package, and the native library

All variants have the same files, since the library loads under every torch: that of CUDA too where
there is no GPU. `kernels` picks one by what torch was built for: "cpu", or the CUDA of the same
first number and no later second one.

`kernels` imports a variant under the ``id`` in its metadata. So the package's imports of itself
become relative ones, and the id has the digest of the files in it: two builds never share a name,
nor the namespace of their ops, which is the same word (bigkernel/_native.py).
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import bigkernel
from bigkernel import _library, _native
from bigkernel.hub import layers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bigkernel"
NAME = "bigkernel"
ENTRY = f"{NAME}.hub"  # the package that becomes the root of a variant
# Of what callers see (`bigkernel.hub.__all__`): transformers asks for version 1, the branch v1.
VERSION = 1
BACKENDS = ("cpu", "cu126", "cu130")


def module_path(module: str) -> Path | None:
    """The file of a module of the package, None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file
    return None


def imported(tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if module_path(full) else str(node.module))
    return found


def needed() -> dict[str, str]:
    """Module -> source of all that the kernel imports, in the end."""
    found: dict[str, str] = {}
    waiting = {ENTRY}
    while waiting:
        module = waiting.pop()
        path = module_path(module)
        assert path is not None, module
        found[module] = path.read_text()
        waiting |= imported(ast.parse(found[module])) - found.keys()
    return found


def relative(module: str, source: str) -> str:
    """The source of a module, with its imports of the package made relative."""
    place = _place(module)
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wrong = [alias.name for alias in node.names if alias.name.split(".")[0] == NAME]
            if wrong:
                sys.exit(f"hub: {module} must import {wrong[0]} by `from {NAME} import ..`.")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            target = f"{node.module}.".replace(f"{ENTRY}.", f"{NAME}.").split(".", 1)[1]
            dots = "." * len(place.parts)
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(
                f"from {node.module} import", f"from {dots}{target.rstrip('.')} import", 1
            )
    return "\n".join(lines)


def _place(module: str) -> Path:
    """Where a module stands in a variant."""
    path = module_path(module)
    assert path is not None
    path = path.relative_to(PACKAGE)
    return path.relative_to("hub") if path.parts[0] == "hub" else path


def files() -> dict[str, bytes]:
    """Path in a variant -> contents."""
    found = {
        str(_place(module)): relative(module, source).encode()
        for module, source in needed().items()
    }
    for path in list(found):
        for folder in list(Path(path).parents)[:-1]:
            # What the others import of it they import from its modules.
            found.setdefault(str(folder / "__init__.py"), b"")
    found[_native.PATH.name] = _native.PATH.read_bytes()
    found["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    return dict(sorted(found.items()))


def digest(contents: bytes) -> str:
    """SHA-256 in base64, as `kernels` compares it."""
    return base64.b64encode(hashlib.sha256(contents).digest()).decode()


def archs(names: str) -> list[str]:
    """The GPU architectures of a build as `kernels` writes them: 8.0, 9.0a, 9.0+PTX."""
    return [
        f"{major}.{minor}" + ("+PTX" if ptx else "")
        for ptx, major, minor in re.findall(r"(PTX for )?sm_(\d+)(\d[af]?)\b", names)
    ]


def metadata(backend: str, digests: dict[str, str], cuda_archs: str) -> dict[str, Any]:
    whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    kind: dict[str, Any] = {"type": "cpu" if backend == "cpu" else "cuda"}
    if kind["type"] == "cuda":
        kind["archs"] = archs(cuda_archs)
    return {
        "name": NAME,
        "id": f"_{NAME}_{kind['type']}_{whole[:10]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": kind,
        "digest": {"algorithm": "sha256", "files": digests},
    }


def variant(backend: str) -> str:
    torch = "".join(map(str, _native.OLDEST_TORCH))
    return f"torch-stable-abi{torch}-{backend}-{platform.machine()}-linux"


CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
- attention
- training
---

# bigkernel {version}

Attention, norms, rotary embedding, gated units and losses that train transformers' models, forward
and backward: on CPUs (x86-64, from AVX2 to AMX), and on GPUs with the kernels that this build has:
{cuda}. What has none runs in plain PyTorch, and a warning says so.

Python 3.11 or later, Linux on {machine}, torch {torch} or later, NumPy.

## Attention

```python
model.set_attn_implementation("ORG/NAME", allow_all_kernels=True)
```

`kernels.get_kernel("ORG/NAME", version={api}, trust_remote_code=True)` has the functions below.

## Functions

{functions}

## Layers

{layers}

All have a backward, and go through `torch.compile(fullgraph=True)`.

```python
from kernels import LayerRepository, register_kernel_mapping

for layer, name in (("RMSNorm", "RMSNorm"), ("rotary_pos_emb", "RotaryPosEmb")):
    repository = LayerRepository("ORG/NAME", layer_name=name, version={api}, trust_remote_code=True)
    register_kernel_mapping({{layer: {{"cpu": repository, "cuda": repository}}}})
model.train()
model.set_use_kernels(True)
```
"""


def card(info: _native.BuildInfo) -> str:
    shown = [name for name in bigkernel.hub.__all__ if callable(getattr(bigkernel.hub, name))]
    return CARD.format(
        version=bigkernel.__version__,
        cuda=f"CUDA {info.cuda}, {info.cuda_archs}" if info.cuda else "none",
        torch=".".join(map(str, _native.OLDEST_TORCH)),
        machine=platform.machine(),
        api=VERSION,
        functions="\n".join(f"- `{name}`" for name in shown),
        layers="\n".join(
            f"- `{name}`: {(getattr(layers, name).__doc__ or '').splitlines()[0]}"
            for name in layers.__all__
        ),
    )


def build(folder: Path) -> list[Path]:
    """Write the kernel's folder anew; returns its variants."""
    native = _library.native
    if native is None:
        sys.exit(f"hub: there is no native library to pack: {_library.native_error}.")
    info = native.build_info()
    contents = files()
    shutil.rmtree(folder / "build", ignore_errors=True)
    made = [folder / "build" / variant(backend) for backend in BACKENDS]
    for path, each in contents.items():
        (made[0] / path).parent.mkdir(parents=True, exist_ok=True)
        (made[0] / path).write_bytes(each)
    for other in made[1:]:
        shutil.copytree(made[0], other, copy_function=os.link)  # on the disk but once
    digests = {path: digest(each) for path, each in contents.items()}
    for backend, path in zip(BACKENDS, made, strict=True):
        said = json.dumps(metadata(backend, digests, info.cuda_archs), indent=2)
        (path / "metadata.json").write_text(said + "\n")
    (folder / "README.md").write_text(card(info))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "hub")
    folder = parser.parse_args().folder
    made = build(folder)
    size = sum(path.stat().st_size for path in made[0].rglob("*")) / 2**20
    print(f"{folder}: {', '.join(path.name for path in made)}, {size:.1f} MB each")


if __name__ == "__main__":
    main()
