"""bigkernel inside other libraries."""

from bigkernel.extras import needs

with needs("train", "bigkernel.integrations"):
    import transformers as _  # noqa: F401

    from bigkernel.integrations.replace import accelerate, restore

__all__ = ["accelerate", "restore"]
