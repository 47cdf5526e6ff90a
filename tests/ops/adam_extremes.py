"""What is not an ordinary number, in each input of Adam, for tests of every backend."""

import itertools

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
# parameter, gradient, moments, masters
DTYPES = {
    "fp32": (F32, F32, F32, False),
    "fp32-bf16-moments": (F32, F32, BF16, False),
    "bf16-masters": (BF16, BF16, F32, True),
    "fp16": (F16, F16, F32, False),
}
VARIANTS = {
    "adamw": {"decoupled": True},
    "adam-l2": {"decoupled": False},
    "amsgrad": {"decoupled": True, "amsgrad": True},
    "amsgrad-l2-maximize": {"decoupled": False, "amsgrad": True, "maximize": True},
}
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}
INPUTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters")
VALUES = (NAN, INF, -INF, 3e38, -0.0, 1e-44)
GRADIENT_SCALES = [10.0**k for k in range(-38, 39)]


def extreme_lists(dtypes, amsgrad):
    """One tensor in which every value stands once in every input, for full vectors and for tails.

    A second moment is a sum of squares: it is never negative.
    """
    param, grad, moment, masters = DTYPES[dtypes]
    places = [
        (name, value)
        for name, value in itertools.product(INPUTS, VALUES)
        if not (name in ("exp_avg_sqs", "max_exp_avg_sqs") and value < 0)
    ]
    n = 3 * len(places) + 5
    g = torch.Generator().manual_seed(0)
    filled = {name: torch.randn(n, generator=g) * 0.1 for name in INPUTS}
    for name in ("exp_avg_sqs", "max_exp_avg_sqs"):
        filled[name].square_()
    for name in ("params", "masters"):  # a master is its parameter before rounding
        filled[name] = filled["params"]
    for i, (name, value) in enumerate(places):
        filled[name][i :: len(places)] = value
    kinds = dict(zip(INPUTS, (param, grad, moment, moment, moment, F32), strict=True))
    lists = {name: [x.to(kinds[name], copy=True)] for name, x in filled.items()}
    for name, wanted in (("max_exp_avg_sqs", amsgrad), ("masters", masters)):
        if not wanted:
            lists[name] = []
    return lists | {"steps": [torch.tensor(3.0)]}


def torch_step(lists, options):
    """What torch.optim makes of these lists, in fp32, a tensor at a time."""
    options = HYPER | {"amsgrad": False, "maximize": False} | options
    start = (lists["masters"] or lists["params"])[0]
    p = torch.nn.Parameter(start.to(F32, copy=True))
    optimizer = (torch.optim.AdamW if options["decoupled"] else torch.optim.Adam)(
        [p],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
        foreach=False,
    )
    names = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}
    if options["amsgrad"]:
        names["max_exp_avg_sqs"] = "max_exp_avg_sq"
    optimizer.state[p] = {key: lists[name][0].to(F32, copy=True) for name, key in names.items()}
    optimizer.state[p]["step"] = lists["steps"][0].clone()
    p.grad = lists["grads"][0].to(F32)
    optimizer.step()
    wanted = {name: optimizer.state[p][key] for name, key in names.items()}
    wanted["masters" if lists["masters"] else "params"] = p.detach()
    if lists["masters"]:
        wanted["params"] = p.detach()
    return wanted


def assert_like_torch(lists, wanted):
    """NaN and infinities at the same places; the rest alike, as far as the dtype goes."""
    for name, value in wanted.items():
        got = lists[name][0]
        rtol = {F32: 1e-4, BF16: 2**-7, F16: 2**-10}[got.dtype]
        # Infinities too: rounding to a narrow type makes some.
        want = value.to(got.dtype)
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients_of_scale(scale, dtype):
    """Lists of one element, of less than a vector, of units and a rest; zeros among them."""
    g = torch.Generator().manual_seed(1)
    sizes = [(1,), (5,), (700,)]
    grads = [(torch.randn(s, generator=g).double() * scale).to(dtype) for s in sizes]
    return [*grads, torch.zeros(600, dtype=dtype)]


def assert_norm(actual, grads):
    """Within two ulps of the exact norm; one step of the smallest numbers below them."""
    exact = torch.linalg.vector_norm(torch.cat([g.double() for g in grads])).float()
    torch.testing.assert_close(actual, exact, rtol=2 * torch.finfo(F32).eps, atol=1.5e-45)
