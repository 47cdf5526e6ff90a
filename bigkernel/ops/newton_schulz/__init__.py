"""The Newton-Schulz iteration by which Muon makes matrices nearly orthogonal."""

from bigkernel.ops.newton_schulz.op import newton_schulz

__all__ = ["newton_schulz"]
