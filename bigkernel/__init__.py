"""bigkernel: fused kernels that make training Transformers faster."""

from bigkernel.backend import cpu_isas, explain, use_backend, use_cpu_isa

__version__ = "0.1.0"

__all__ = ["__version__", "cpu_isas", "explain", "use_backend", "use_cpu_isa"]
