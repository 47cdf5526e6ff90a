"""bigkernel inside other libraries."""

from bigkernel.integrations.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
