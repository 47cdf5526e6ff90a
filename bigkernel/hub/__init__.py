"""bigkernel as a kernel of Hugging Face's hub: what transformers and `kernels` look up in one.

``tools/hub.py`` lays this package and what it imports out as a kernel's folder, in which this
module is the whole: it has a name of its own in every build, and its ops are registered under that.
So it stands beside an installed bigkernel, and beside other builds, in one process.

``flash_attn_forward`` needs transformers, which calls it; all else needs torch and NumPy alone.
"""

from typing import Any

from bigkernel.backend import cpu_isas, explain, use_backend
from bigkernel.hub import layers
from bigkernel.ops import (
    attention,
    attention_varlen,
    bias_act,
    cross_entropy,
    glu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rope,
)

__all__ = [
    "attention",
    "attention_varlen",
    "bias_act",
    "cpu_isas",
    "cross_entropy",
    "explain",
    "flash_attn_forward",
    "glu",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "supports_flash_attn",
    "use_backend",
]

# By this and `flash_attn_forward` transformers tells a kernel that has its attention interface.
supports_flash_attn = True


def __getattr__(name: str) -> Any:
    if name == "flash_attn_forward":
        from bigkernel.hub.forward import flash_attn_forward

        return flash_attn_forward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
