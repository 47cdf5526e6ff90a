"""AdamW, Adam and Muon: ``torch.optim``'s, each with all of its step in one place.

A state dict goes both ways between these classes and torch's. Beyond torch's arguments there are
``max_grad_norm`` (clip by the global norm inside the step) and ``master_weights`` (fp32 copies of
16-bit parameters); :class:`Adam` and :class:`Muon` say what else.
"""

from bigkernel.optim.adam import Adam, AdamW
from bigkernel.optim.groups import muon_groups
from bigkernel.optim.muon import Muon

__all__ = ["Adam", "AdamW", "Muon", "muon_groups"]
