"""`bigkernel tune-kernels`: what is timed, and where it is kept."""

from collections.abc import Sequence

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import backend, registry, tuning
from bigkernel.recipes.device import pick_device, use_threads
from bigkernel.recipes.errors import Failure, UsageError


def tune(ops: Sequence[str], quick: bool, clear: bool, device: str, threads: int | None) -> None:
    """Measure the classes of calls of these ops, print them and keep them.

    Raises:
        UsageError: an op that torch has nothing beside, or a backend that was chosen by hand.
        Failure: there is no kernel to measure, or no file can be written.
    """
    contested = {op.noun: op for op in registry.every() if op.contests}
    for noun in ops:
        if noun not in contested:
            known = [op for op in registry.every() if op.noun == noun]
            why = f": {known[0].no_contest}" if known and known[0].no_contest else ""
            raise UsageError(
                f"there is nothing to choose for {noun!r}{why}. There is for: "
                f"{', '.join(contested)}."
            )
    kind = pick_device(device).type
    use_threads(threads)
    if clear:
        there = tuning.clear(kind)
        print("forgotten" if there else "nothing was measured on this machine")
        return
    if backend.is_forced():
        raise UsageError("BIGKERNEL_BACKEND has chosen already. Leave it unset to measure.")
    wanted = tuning.classes(ops or contested, kind)
    if not wanted:
        raise Failure(f"there is no native kernel to measure on {kind!r}; see `bigkernel env`.")
    width = max(len(f"{name} {words}") for name, _, words in wanted)
    print(f"{'':{width}}  ours, ms  torch, ms      x  faster")

    def tell(one: tuning.Class, found: tuning.Figures) -> None:
        name, _, words = one
        print(
            f"{f'{name} {words}':{width}} {1e3 * found.ours:9.3f} {1e3 * found.torch:10.3f} "
            f"{found.ratio:6.2f}  {'torch' if found.takes_torch else 'ours'}",
            flush=True,
        )

    found = tuning.measure(wanted, tuning.QUICK if quick else tuning.PLAN, tell=tell)
    figures = {(name, words): of for (name, _, words), of in found.items()}
    try:
        file = tuning.save(kind, figures)
    except OSError as error:
        raise Failure(f"the figures could not be kept: {error}") from error
    tuning.forget()
    count = sum(of.takes_torch for of in figures.values())
    print(f"torch's own code is taken for {count} of {len(figures)} classes of calls")
    print(f"written: {file}")
