"""Runs Python programs as forks of one process that has torch and other libraries loaded.

Loading them takes longer than most tests that are to notice a small change. The process is this
file run as a script, so that nothing of a tree is loaded in it; one line of JSON is a request.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LOADED = ("torch", "pytest", "torchvision.transforms.v2", "transformers.trainer")


class Forks:
    """``run`` is like ``python ARGUMENTS`` in a folder; the process starts with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
        """(exit code, what was written to stdout and stderr) with ``env`` besides this one."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), "env": env}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code, output = json.loads(self._process.stdout.readline())
        return code, output


def _serve() -> None:
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                _become(request, output.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([code, output.read().decode(errors="replace")]), flush=True)


def _become(request: dict[str, Any], output: int) -> None:
    """The program, which ends this process."""
    code: object = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        os.environ.update(request["env"])
        sys.path[0] = request["folder"]
        sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
        flag, *rest = request["arguments"]
        if flag == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["arguments"]
            runpy.run_path(flag, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code) if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
