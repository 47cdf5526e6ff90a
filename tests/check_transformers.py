"""The tests that lean on transformers, under other versions of it: `make test-transformers`.

    python tests/check_transformers.py [--all] VERSION...

Each version gets an environment of its own (.venv-transformers/VERSION) that takes everything else
from the environment of this interpreter, so that neither torch nor the build is there twice. The
quick part takes a minute or two a version, and leaves out the version that is in this environment,
under which `make test` runs all tests; --all runs every test of the files under every version.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ["tests/test_contract.py", "tests/test_integrations.py", "tests/test_trainer.py"]
# Masks and packing against eager attention; each method that the Trainer overrides, once.
QUICK = (
    "test_contract",
    "packed",
    "less_usual",
    "irregular_positions",
    "generation_matches",
    "attention_weights_are_eagers",
    "patch_says",
    "trains_as_transformers",
    "epochs_metrics",
    "callbacks_beside",
    "augmentation_is_for_training",
    "resumed_image",
    "checkpoint_of_transformers_own",
    "rotation_and_best",
    "schedule_is_used",
    "weights_that_lack",
    "a_signal_saves",
)


def environment(version: str) -> Path:
    """The interpreter of an environment with this version of transformers."""
    folder = ROOT / ".venv-transformers" / version
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        options = ["--quiet", "--no-compile", "--no-deps", "--disable-pip-version-check"]
        wanted = f"transformers=={version}"
        subprocess.run([str(python), "-m", "pip", "install", *options, wanted], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        # After pip, which must not take what lies there for its own.
        (packages / "everything_else.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every test of the files")
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    arguments = parser.parse_args()
    selection = [] if arguments.all else ["-k", " or ".join(QUICK)]
    # The package of this tree: an editable install is not seen from another environment.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for version in arguments.versions:
        if version == version_of("transformers") and not arguments.all:
            print(f"transformers {version}: left to `make test`, whose environment has it")
            continue
        python = environment(version)
        found = "import transformers; print(transformers.__version__)"
        said = subprocess.check_output([str(python), "-c", found], text=True).strip()
        assert said == version, f"expected transformers {version}, got {said}"
        print(f"transformers {version}:", flush=True)
        command = [str(python), "-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "4"]
        command += ["--dist", "loadgroup", *FILES, *selection]
        if subprocess.run(command, cwd=ROOT, env=env).returncode:
            sys.exit(f"the tests fail under transformers {version}")


if __name__ == "__main__":
    main()
