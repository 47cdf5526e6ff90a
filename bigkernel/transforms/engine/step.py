"""What every step has in common: the base of those in ``bigkernel/transforms/steps.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bigkernel.expect import Expect
from bigkernel.transforms.engine.samples import Bools, Ints, Samples

if TYPE_CHECKING:
    from bigkernel.transforms.engine.table import Table


# The dtype of an array with one entry a sample, and the shape of an entry (-1: any length).
Entry = tuple[Any, tuple[int, ...]]
BOOL: Entry = (np.dtype(np.bool_), ())
INT: Entry = (np.dtype(np.int64), ())


def _agree(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if given == wanted:
        return True
    return len(given) == len(wanted) and all(
        w in (-1, g) for g, w in zip(given, wanted, strict=True)
    )


@dataclass
class Step(Samples):
    """``active`` [N]: the samples that the step touches.

    What has one entry a sample may be given as anything that NumPy turns into an array of that
    shape, one number for all of them included.
    """

    active: Bools

    arrays: ClassVar[Mapping[str, Entry]] = {}  # the fields beside it with one entry a sample
    # Whether a table has one entry for all of its samples, so that those that the step touches and
    # those that it does not need tables of their own.
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Makes the fields arrays [N, ...], or says what is wrong with them."""
        self._spell("active", BOOL, np.size(self.active))
        n = len(self.active)
        for name, entry in self.arrays.items():
            self._spell(name, entry, n)

    @property
    def _expect(self) -> Expect:
        return Expect(f"transforms.steps.{type(self).__name__}")

    def _spell(self, name: str, entry: Entry, n: int) -> None:
        dtype, value = entry[0], getattr(self, name)
        shape = (n, *entry[1])
        if type(value) is np.ndarray and value.dtype == dtype and value.shape == shape:
            return  # as most transforms of this package make them
        array = np.asarray(value)
        if -1 not in shape and array.size == 1:
            array = np.full(shape, array.item())
        kinds, what = {
            "b": ("b", "booleans"),
            "i": ("iu", "whole numbers"),
            "f": ("fiu", "numbers"),
        }[dtype.kind]
        whole = dtype.kind == "i" and array.dtype.kind == "f" and (array == np.rint(array)).all()
        if not ((array.dtype.kind in kinds or whole) and _agree(array.shape, shape)):
            sides = ", ".join("k" if side < 0 else str(side) for side in shape)
            wanted = f"{what} [{sides}], one entry for each image"
            raise self._expect.error(name, wanted, f"{array.dtype} {list(array.shape)}")
        setattr(self, name, array.astype(dtype))

    def check(self, height: Ints, width: Ints) -> None:
        """Raises where the step cannot be done to images of these sizes."""

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        """The images' sizes after the step, from those before it."""
        return height, width

    def of_pictures(self, modes: frozenset[str]) -> Step:
        """The step as it is done to PIL images of these modes."""
        return self

    def begins(self, after: Step, table: Table) -> bool:
        """Writes itself and the step after it into a table that holds nothing yet, in one go.

        It leaves the table as ``write`` of both would. Returns whether it did: by itself, never.
        """
        return False

    def fits(self, table: Table) -> Bools:
        """[n]: the samples whose table can hold the step; those not active are not looked at."""
        raise NotImplementedError(self._says_not("fits", "for which images it fits into the table"))

    def write(self, table: Table) -> None:
        """Writes the step, which fits, into the table; its sizes are set by who calls this."""
        raise NotImplementedError(self._says_not("write", "what it does to the table"))

    def _says_not(self, method: str, what: str) -> str:
        return (
            f"bigkernel.transforms: a step must say {what}, got {type(self).__name__}, which does "
            f"not. Define {method}(table) in it, or use the steps of bigkernel.transforms.steps."
        )
