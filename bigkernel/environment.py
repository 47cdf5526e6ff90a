"""Every environment variable that bigkernel reads, in one table.

``setup.py``, the documentation and ``tests/test_environment.py`` read it; it imports nothing of the
package, so that a build can load it before anything is installed.
"""

from typing import Literal, NamedTuple

When = Literal["build", "run", "test"]


class Variable(NamedTuple):
    """An environment variable: what it may hold, what holds without it, and what it does."""

    name: str
    when: When
    values: str
    default: str
    effect: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "BIGKERNEL_NATIVE",
        "build",
        "0 or 1",
        "1",
        "0: a pure-Python package, nothing is compiled. At run time, 0 ignores a native library "
        "that is there.",
    ),
    Variable(
        "BIGKERNEL_CUDA",
        "build",
        "0 or 1",
        "if nvcc matches torch",
        "0 leaves the CUDA kernels out; 1 insists on them, and the build fails without nvcc.",
    ),
    Variable(
        "TORCH_CUDA_ARCH_LIST",
        "build",
        'as torch spells them ("8.0;9.0+PTX"), or "all"',
        "of the GPUs present, else those the tests need",
        'GPU architectures to compile for; "all" is what a wheel gets.',
    ),
    Variable(
        "CUDA_HOME",
        "build",
        "a folder",
        "where nvcc on PATH says it is",
        "The CUDA toolkit, if nvcc is not on PATH.",
    ),
    Variable(
        "MAX_JOBS",
        "build",
        "a whole number",
        "one for each core",
        "Compilers that run at a time; lower it if memory runs out.",
    ),
    Variable(
        "BIGKERNEL_SANITIZE",
        "build",
        "0 or 1",
        "0",
        "1 compiles the CPU kernels with AddressSanitizer and UBSan (make test-sanitize).",
    ),
    Variable(
        "BIGKERNEL_BACKEND",
        "run",
        "cuda, cpu or torch",
        "the automatic choice",
        "The backend of every op, whatever was measured; a native one that cannot take a call "
        "is an error.",
    ),
    Variable(
        "BIGKERNEL_STRICT",
        "run",
        "0 or 1",
        "0",
        "1 turns a call that falls back to PyTorch from a warning into an error.",
    ),
    Variable(
        "BIGKERNEL_CPU_ISA",
        "run",
        "portable, avx2, avx512, avx512_bf16 or amx",
        "the best for this processor",
        "The instruction set of the CPU kernels; one that the processor lacks is an error.",
    ),
    Variable(
        "XDG_CACHE_HOME",
        "run",
        "an absolute path",
        "~/.cache",
        "Where the folder bigkernel lies in which `bigkernel tune-kernels` keeps its figures.",
    ),
    Variable(
        "BIGKERNEL_TRACEBACK",
        "run",
        "0 or 1",
        "0",
        "1 makes the command line show Python's traceback with an error.",
    ),
    Variable(
        "BIGKERNEL_PTX_CACHE",
        "run",
        "a folder",
        "none: compiled again in each process",
        "Where the emulator keeps what nvcc made of a kernel.",
    ),
    Variable(
        "BIGKERNEL_EXPECT_SANITIZER",
        "test",
        "0 or 1",
        "0",
        "1 stops the tests unless the module under test was built with the sanitizers.",
    ),
    Variable(
        "BIGKERNEL_DEMO_RUNS",
        "test",
        "a folder",
        "none: the tests train the demo's models themselves",
        "What `make demo` has just trained from the same sources, for the tests to look at.",
    ),
)


def as_text(when: When) -> str:
    """The variables of one kind as indented lines, for a docstring or a help text."""
    lines = []
    for variable in VARIABLES:
        if variable.when == when:
            lines.append(f"  {variable.name}: {variable.values} (default: {variable.default})")
            lines.append(f"      {variable.effect}")
    return "\n".join(lines)
