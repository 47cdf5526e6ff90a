"""The ops: a folder each, with its schema, checks, PyTorch definition and public functions.

Every folder is imported, which registers its op (``bigkernel/registry.py``), and its public names
are names of this module too.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what the loop below brings, for readers of types
    from bigkernel.ops.adam import AdamGroup, adam_groups_step_, adam_norm, adam_step_
    from bigkernel.ops.attention import attention, attention_varlen
    from bigkernel.ops.augment import augment
    from bigkernel.ops.bias_act import bias_act
    from bigkernel.ops.cross_entropy import cross_entropy
    from bigkernel.ops.glu import glu
    from bigkernel.ops.linear import linear
    from bigkernel.ops.linear_cross_entropy import linear_cross_entropy
    from bigkernel.ops.newton_schulz import newton_schulz
    from bigkernel.ops.norm import layer_norm, rms_norm
    from bigkernel.ops.rope import rope, rope_

__all__ = [
    "AdamGroup",
    "adam_groups_step_",
    "adam_norm",
    "adam_step_",
    "attention",
    "attention_varlen",
    "augment",
    "bias_act",
    "cross_entropy",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "newton_schulz",
    "rms_norm",
    "rope",
    "rope_",
]

for _info in pkgutil.iter_modules(__path__):
    _op = importlib.import_module(f"{__name__}.{_info.name}")
    # Afterwards: importing a folder binds its own name here, which may be that of a function.
    globals().update({name: getattr(_op, name) for name in _op.__all__})
