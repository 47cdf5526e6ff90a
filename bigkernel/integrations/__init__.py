"""bigkernel inside other libraries."""

from bigkernel.integrations.patching import accelerate, patch, restore, unpatch

__all__ = ["accelerate", "patch", "restore", "unpatch"]
