"""Tensor subclasses at the ops of a training step: those that define operations are refused.

Attention's and augmentation's are in test_attention_tensors.py and test_augment.py.
"""

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from bigkernel import ops


class OfItsOwn(torch.Tensor):
    """Its data may be anything: here, what is meant is the negative."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Labelled(torch.Tensor):
    """Data with a note: torch says what operations mean."""


def of_its_own():
    return torch.ones(4, 8).as_subclass(OfItsOwn)


X, TABLE = torch.ones(4, 8), torch.ones(1, 4, 8)
HEADS = torch.ones(1, 1, 4, 8)
ZEROS = torch.zeros(4, dtype=torch.int64)
CALLS = {
    "rms_norm x": lambda t: ops.rms_norm(t),
    "rms_norm weight": lambda t: ops.rms_norm(X, t[0]),
    "rms_norm residual": lambda t: ops.rms_norm(X, residual=t),
    "layer_norm x": lambda t: ops.layer_norm(t),
    "layer_norm bias": lambda t: ops.layer_norm(X, None, t[0]),
    "glu gate": lambda t: ops.glu(t, X),
    "glu up": lambda t: ops.glu(X, t),
    "bias_act x": lambda t: ops.bias_act(t),
    "rope q": lambda t: ops.rope(t[None, None], HEADS, TABLE, TABLE),
    "rope k": lambda t: ops.rope(HEADS, t[None, None], TABLE, TABLE),
    "rope cos": lambda t: ops.rope(HEADS, HEADS, t[None], TABLE),
    "rope_ q": lambda t: ops.rope_(t[None, None], HEADS.clone(), TABLE, TABLE),
    "cross_entropy logits": lambda t: ops.cross_entropy(t, torch.zeros(4, dtype=torch.int64)),
    "cross_entropy weight": lambda t: ops.cross_entropy(
        X, torch.zeros(4, dtype=torch.int64), weight=t[0]
    ),
    "cross_entropy labels": lambda t: ops.cross_entropy(X, t[:, 0].long()),
    "linear input": lambda t: ops.linear(t, X),
    "linear weight": lambda t: ops.linear(X, t),
    "linear bias": lambda t: ops.linear(X, X, t[:, 0]),
    "linear_cross_entropy input": lambda t: ops.linear_cross_entropy(t, X, ZEROS),
    "linear_cross_entropy linear_weight": lambda t: ops.linear_cross_entropy(X, t, ZEROS),
    "linear_cross_entropy linear_bias": lambda t: ops.linear_cross_entropy(
        X, X, ZEROS, linear_bias=t[:, 0]
    ),
    "linear_cross_entropy target": lambda t: ops.linear_cross_entropy(X, X, t[:, 0].long()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_says_itself_what_it_means_is_refused(call):
    with pytest.raises(TypeError, match="must be a plain tensor, got a OfItsOwn, whose data"):
        call(of_its_own())


def test_a_causal_bias_is_no_input_of_a_norm():
    with pytest.raises(TypeError, match="got a CausalBias"):
        ops.rms_norm(causal_lower_right(4, 8))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_its_data_is_taken(call):
    """As the same data in a plain tensor."""
    data = torch.rand(4, 8)
    want, got = call(data.clone()), call(data.clone().as_subclass(Labelled))
    want, got = ((r,) if isinstance(r, torch.Tensor) else r for r in (want, got))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
