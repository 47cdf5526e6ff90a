"""bigkernel inside other libraries."""

from bigkernel.extras import needs

with needs("train", "bigkernel.integrations"):
    import transformers as _  # noqa: F401

    from bigkernel.integrations.patching import accelerate, patch, restore, unpatch

__all__ = ["accelerate", "patch", "restore", "unpatch"]
