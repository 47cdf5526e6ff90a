"""bigkernel inside other libraries."""

from bigkernel.integrations.replace import accelerate, restore

__all__ = ["accelerate", "restore"]
