"""bigkernel: fused kernels that make training Transformers faster."""

from bigkernel import ops
from bigkernel.backend import cpu_isas, explain, use_backend, use_cpu_isa
from bigkernel.ops._sdpa import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "cpu_isas",
    "explain",
    "ops",
    "scaled_dot_product_attention",
    "use_backend",
    "use_cpu_isa",
]
