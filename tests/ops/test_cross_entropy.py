"""Cross-entropy of given logits. Which feature has which test:

reductions, ignored rows, smoothing, z-loss,
softcap, class weights, soft labels, dtypes matches_torch
numbers of classes and rows, strides        shapes, noncontiguous
large logits, masked classes, NaN           extremes, masked_classes, non_finite
gradient in place of the logits             overwrites_*
bits: threads, batch                        thread_count, a_row_depends_on_nothing_else
nothing counted, no rows                    all_ignored, no_rows
opcheck, compile, gradcheck, torch.func     opcheck, compile, gradcheck, torch_func
float64, bad input                          float64, rejects_bad_input
"""

import pytest
import torch
import torch._dynamo.testing
from fused_cases import BF16, DTYPES, F32, F64, assert_fused, normal, threads
from torch.nn import functional as F

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": True},
    "everything": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "weight": True},
    "soft": {"soft": True},
    "everything soft": {
        "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "weight": True, "soft": True,
    },
}  # fmt: skip
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def torch_cross_entropy(
    logits, labels, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    z_loss=0.0, softcap=0.0,
):  # fmt: skip
    """torch's, on float32 logits, as transformers calls it; with what it does not have."""
    z = logits.to(torch.promote_types(logits.dtype, F32))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    weight = None if weight is None else weight.to(z.dtype)
    given = {"weight": weight, "label_smoothing": label_smoothing}
    soft = labels.is_floating_point()
    if soft:
        labels = labels.to(z.dtype)
    else:
        given["ignore_index"] = ignore_index
    loss = F.cross_entropy(z, labels, reduction=reduction, **given)
    if z_loss == 0:
        return loss
    kept = torch.ones(len(z), dtype=torch.bool) if soft else labels != ignore_index
    extra = (z_loss * z.logsumexp(-1).square()).masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss + extra
    if reduction == "sum":
        return loss + extra.sum()
    counted = kept.sum() if weight is None or soft else weight[labels[kept]].sum()
    return loss + extra.sum() / counted


def labels_of(rows, classes, ignored=True, seed=3):
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    if ignored:
        labels[1::5] = -100
    return labels


def soft_labels(labels, classes, dtype=F32):
    """Probabilities in place of labels; a row's follow from its label."""
    return (labels[:, None] + torch.arange(classes) * 0.37).sin().mul(2).softmax(-1).to(dtype)


def functions(labels, options, classes, **more):
    options = dict(options, **more)
    if options.pop("soft", False):
        labels = soft_labels(labels, classes)
    if "weight" in options:
        options["weight"] = normal((classes,), F32, 8).abs() + 0.1
    given = {k: v for k, v in options.items() if k != "overwrite_logits"}
    return (
        lambda x: ops.cross_entropy(x, labels, **options),
        lambda x: torch_cross_entropy(x, labels, **given),
    )


@each_option
@each_dtype
@each_reduction
def test_cross_entropy_matches_torch(cpu_isa, options, dtype, reduction):
    """Of some draws at once: of one alone torch's sum may be exact by luck."""
    ours, theirs = functions(labels_of(37, 1500), options, 1500, reduction=reduction)
    assert_fused(
        lambda draws: torch.stack([ours(x) for x in draws]),
        lambda draws: torch.stack([theirs(x) for x in draws]),
        [normal((6, 37, 1500), dtype, 0, 3.0)],
    )


@each_option
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1023, 1024, 1025, 4099])
def test_cross_entropy_shapes(cpu_isa, options, classes):
    """Around a vector and around a block; labels at both ends."""
    logits = normal((200, classes), F32, 0, 2.0)
    labels = labels_of(200, classes)
    labels[0], labels[-1] = 0, classes - 1
    ours, theirs = functions(labels, options, classes, reduction="none")
    if classes == 1 and not options.get("z_loss"):
        torch.testing.assert_close(ours(logits), theirs(logits))  # 0, and a gradient of 0
    else:
        assert_fused(ours, theirs, [logits])


@each_dtype
@pytest.mark.parametrize("classes", [1, 17, 1500])
def test_cross_entropy_soft_labels_of_the_logits_dtype(cpu_isa, dtype, classes):
    """Rows of zeros too, which torch takes as well; whose strides are even or not."""
    logits, soft = (
        normal((9, classes), dtype, 0),
        soft_labels(labels_of(9, classes), classes, dtype),
    )
    soft[3] = 0
    wide = torch.zeros(9, classes + 30, dtype=dtype)
    wide[:, 7 : 7 + classes] = soft
    results = []
    for given in (soft, wide[:, 7 : 7 + classes], soft.T.contiguous().T):
        leaf = logits.clone().requires_grad_()
        loss = ops.cross_entropy(leaf, given)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
        if classes > 1:
            assert_fused(
                lambda x, q=given: ops.cross_entropy(x, q, reduction="none"),
                lambda x, q=given: torch_cross_entropy(x, q, reduction="none"),
                [logits],
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cross_entropy_of_soft_labels_beside_the_logits_leaves_them_whole():
    """Labels in the memory of the logits would be read while the gradient is written there."""
    leaf = normal((4, 30), F32, 0).requires_grad_()
    grads = []
    for overwrite in (False, True):
        both = torch.cat([leaf * 2, leaf.detach().softmax(-1)], 1)
        labels = both.detach()[:, 30:]
        loss = ops.cross_entropy(both[:, :30], labels, overwrite_logits=overwrite)
        grads.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(labels, leaf.detach().softmax(-1))
    assert torch.equal(*grads)


def test_cross_entropy_noncontiguous():
    logits, labels = normal((9, 40), F32, 0), labels_of(9, 40)
    want = ops.cross_entropy(logits, labels, reduction="none")
    wide = torch.zeros(9, 100)
    wide[:, 30:70] = logits
    for other in (
        wide[:, 30:70],
        logits.T.contiguous().T,
        torch.stack((logits, logits), -1)[..., 0],
    ):
        assert torch.equal(ops.cross_entropy(other, labels, reduction="none"), want)
    strided = torch.stack((labels, labels), -1)[:, 0]
    assert torch.equal(ops.cross_entropy(logits, strided, reduction="none"), want)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_cross_entropy_extremes(cpu_isa, offset, scale):
    logits = normal((8, 700), F32, 0, scale) + offset
    for options in ({}, {"label_smoothing": 0.1}):
        assert_fused(*functions(labels_of(8, 700), options, 700), [logits])


def test_cross_entropy_masked_classes(cpu_isa):
    """-inf for classes that may not be: whole blocks of them, at the beginning too."""
    logits = normal((6, 3000), F32, 0)
    logits[:, :1100] = float("-inf")
    logits[2, 1500:] = float("-inf")
    labels = torch.full((6,), 1300)
    ours, theirs = functions(labels, {}, 3000)
    assert_fused(ours, theirs, [logits])
    smooth = ops.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    assert (smooth == float("inf")).all()  # as torch's
    logits[3] = float("-inf")
    assert ops.cross_entropy(logits, labels, reduction="none").isnan().tolist() == [
        i == 3 for i in range(6)
    ]


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 700, 1499])
def test_cross_entropy_non_finite_stays_in_its_row(cpu_isa, dtype, bad, place):
    logits, labels = normal((6, 1500), dtype, 0), labels_of(6, 1500, ignored=False)
    clean = ops.cross_entropy(logits, labels, reduction="none")
    logits[2, place] = bad
    leaf = logits.requires_grad_()
    got = ops.cross_entropy(leaf, labels, reduction="none")
    want = torch_cross_entropy(leaf, labels, reduction="none")
    assert torch.equal(got.isnan(), want.isnan())
    others = torch.arange(6) != 2
    assert torch.equal(got[others], clean[others])
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    assert grad[others].isfinite().all()
    assert grad[2].isnan().any()


@each_option
@each_dtype
@each_reduction
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_cross_entropy_overwrites_its_logits(options, dtype, reduction, backend):
    """The gradient is the same, and lies where the logits were."""
    labels, weights = labels_of(20, 300), normal((20,), F32, 5)
    results = []
    for overwrite in (False, True):
        ours, _ = functions(labels, options, 300, reduction=reduction, overwrite_logits=overwrite)
        leaf = normal((20, 300), dtype, 0).requires_grad_()
        logits = leaf * 2
        gradients = []
        logits.register_hook(gradients.append)
        with use_backend(backend):
            loss = ours(logits)
            (loss * (weights if reduction == "none" else 3.0)).sum().backward()
        assert (gradients[0].data_ptr() == logits.data_ptr()) == overwrite
        results.append((loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_cross_entropy_overwriting_keeps_autograds_rules():
    labels = labels_of(4, 30)

    def loss_of(logits):
        return ops.cross_entropy(logits, labels, overwrite_logits=True)

    leaf = normal((4, 30), F32, 0).requires_grad_()
    logits = leaf * 2
    loss = loss_of(logits)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # Others who need the logits: right if their backward comes first, an error if later.
    logits = leaf * 2
    other = logits.square().sum()
    loss = loss_of(logits)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    before = leaf.detach().clone()
    loss_of(leaf).backward()  # a leaf stays as it is
    assert torch.equal(leaf.detach(), before)
    logits = leaf * 2
    strided = logits.T.contiguous().T
    loss_of(strided).backward()
    with torch.no_grad():
        kept = logits.clone()
        loss_of(logits)
        assert torch.equal(kept, logits)


@each_option
def test_cross_entropy_thread_count_changes_nothing(options):
    labels = labels_of(300, 500)
    results = []
    for count in (1, 2, 3):
        ours, _ = functions(labels, options, 500)
        leaf = normal((300, 500), BF16, 0).requires_grad_()
        with threads(count):
            loss = ours(leaf)
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_option
def test_cross_entropy_a_row_depends_on_nothing_else(cpu_isa, options):
    labels, logits = labels_of(30, 1100), normal((30, 1100), F32, 0)

    def run(rows):
        ours, _ = functions(labels[rows], options, 1100, reduction="none")
        leaf = logits[rows].clone().requires_grad_()
        losses = ours(leaf)
        losses.sum().backward()
        return losses.detach(), leaf.grad

    whole = run(slice(None))
    for rows in (slice(7, 8), slice(3, 20), slice(29, 30)):
        for a, b in zip(run(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_cross_entropy_ignored_rows():
    logits, labels = normal((5, 30), F32, 0).requires_grad_(), torch.full((5,), -100)
    assert ops.cross_entropy(logits, labels).isnan()  # as torch's
    loss = ops.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    # Another ignore_index, one that is a class among them; and an ignored row may hold anything.
    labels = torch.tensor([0, 7, 7, 3, 29])
    assert_fused(*functions(labels, {"ignore_index": 7}, 30), [logits.detach()])
    wild = logits.detach().clone()
    wild[1] = float("nan")
    want = ops.cross_entropy(logits, labels, ignore_index=7)
    leaf = wild.requires_grad_()
    got = ops.cross_entropy(leaf, labels, ignore_index=7)
    assert torch.equal(got, want)
    got.backward()
    assert leaf.grad.isfinite().all()


def test_cross_entropy_no_rows():
    leaf = torch.zeros(0, 30, requires_grad=True)
    for reduction in ("sum", "none"):
        loss = ops.cross_entropy(leaf, torch.zeros(0, dtype=torch.int64), reduction=reduction)
        loss.sum().backward()
        assert loss.sum() == 0
    assert leaf.grad.shape == (0, 30)
    assert ops.cross_entropy(leaf, torch.zeros(0, dtype=torch.int64)).isnan()
    soft = torch.zeros(0, 30)
    assert ops.cross_entropy(leaf, soft, reduction="sum") == 0
    assert ops.cross_entropy(leaf, soft).isnan()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_cross_entropy_opcheck(dtype):
    hard, weight = labels_of(6, 40), normal((40,), F32, 1).abs()
    namespace = torch.ops.bigkernel
    for labels, options in (
        (hard, (weight, -100, 0.1, 1e-3, 20.0)),
        (hard, (None, -100, 0.0, 0.0, 0.0)),
        (soft_labels(hard, 40), (weight, -100, 0.1, 1e-3, 20.0)),
    ):
        logits = normal((6, 40), dtype, 0)
        leaf = logits.clone().requires_grad_()
        torch.library.opcheck(namespace.cross_entropy_fwd.default, (leaf, labels, *options))
        stats = namespace.cross_entropy_fwd(logits, labels, *options)[2]
        given = (normal((6,), F32, 2), logits, labels, options[0], stats, *options[1:])
        torch.library.opcheck(namespace.cross_entropy_bwd.default, given)
        torch.library.opcheck(namespace.cross_entropy_bwd_.default, given)


@pytest.mark.parametrize("overwrite", [False, True], ids=["apart", "overwrite"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_cross_entropy_compile(soft, reduction, overwrite):
    """Without a break, and other lengths compile nothing more."""

    def model(x, labels):
        return ops.cross_entropy(x * 2, labels, reduction=reduction, overwrite_logits=overwrite)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        labels, results = labels_of(rows, 24), []
        labels = soft_labels(labels, 24) if soft else labels
        for function in (compiled, model):
            leaf = normal((rows, 24), F32, 0).requires_grad_()
            loss = function(leaf, labels)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@each_option
@each_reduction
def test_cross_entropy_gradcheck_of_the_reference(options, reduction):
    ours, theirs = functions(labels_of(6, 7), options, 7, reduction=reduction)
    logits = normal((6, 7), F64, 0).requires_grad_()
    with use_backend("torch"):
        assert torch.autograd.gradcheck(ours, [logits])
        torch.testing.assert_close(ours(logits), theirs(logits))


def test_cross_entropy_torch_func():
    logits, labels = normal((4, 12), F32, 0), labels_of(4, 12)

    def loss(x):
        return ops.cross_entropy(x, labels)

    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), want)


def test_cross_entropy_has_no_second_derivative():
    leaf, labels = normal((4, 12), F32, 0).requires_grad_(), labels_of(4, 12)
    (grad,) = torch.autograd.grad(ops.cross_entropy(leaf, labels), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    loss = ops.cross_entropy(leaf * 2, labels, overwrite_logits=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_cross_entropy_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    logits, labels = normal((4, 12), F64, 0), labels_of(4, 12)
    assert "float64 has no native kernel" in bigkernel.explain("cross_entropy", logits)
    bigkernel.backend._warned.clear()
    with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
        loss = ops.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must be \[N, V\].*Flatten"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"logits must be \[N, V\]"),
        ({"logits": torch.zeros(4, 8).int()}, TypeError, "logits must be float16"),
        ({"labels": torch.zeros(4).int()}, TypeError, "an int64 tensor, or.*got torch.int32"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be an int64 tensor, or.*got list"),
        ({"labels": torch.zeros(4)}, ValueError, r"labels must be of shape \(4, 8\)"),
        ({"labels": torch.zeros(4, 8, dtype=F64)}, TypeError, "float32 or of logits's dtype"),
        ({"labels": torch.zeros(4, 8).requires_grad_()}, ValueError, "without a gradient"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"labels must be of shape \(4,\)"),
        ({"labels": torch.tensor([0, 8, 1, 1])}, ValueError, "0 to 7 or ignore_index.*8 at row 1"),
        ({"labels": torch.tensor([0, 1, -1, 1])}, ValueError, "got -1 at row 2"),
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number from 0 to 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a finite number of at least 0"),
        ({"softcap": -3.0}, ValueError, "softcap must be 0"),
        ({"softcap": float("nan")}, ValueError, "softcap must be 0"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be of shape \(8,\)"),
        ({"weight": torch.ones(8, dtype=F64)}, TypeError, "weight must be float32"),
    ],
)  # fmt: skip
def test_cross_entropy_rejects_bad_input(change, error, words):
    given = {"logits": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 7])} | change
    with pytest.raises(error, match=words):
        ops.cross_entropy(given.pop("logits"), given.pop("labels"), **given)
