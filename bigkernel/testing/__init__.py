"""What tests of kernels need; usable from an installed package."""

from bigkernel.testing.tolerance import assert_as_accurate

__all__ = ["assert_as_accurate"]
