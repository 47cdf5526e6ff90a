"""Gradients through transforms, and that they are torchvision's.

PyTorch computes such calls, in whatever dtype. Wanted is torchvision's gradient of the same call
in float64. Its own rotate with a fill and its adjust_hue fail in the backward pass: the first is
put together from rotations without, the second is held against differences by gradcheck.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import bigkernel
from bigkernel import transforms as bk

v2 = pytest.importorskip("torchvision.transforms.v2")
F = v2.functional

pytestmark = pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")


def filled(x: Tensor, fill: Tensor) -> Tensor:
    cover = F.rotate(torch.ones_like(x[:1, :1]), 30.0, "bilinear")
    return cover * (F.rotate(x, 30.0, "bilinear") - fill.view(3, 1, 1)) + fill.view(3, 1, 1)


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
CASES: dict[str, tuple[bk.Transform, Any]] = {
    "flip": (bk.RandomHorizontalFlip(1.0), F.horizontal_flip),
    "vertical-flip": (bk.RandomVerticalFlip(1.0), F.vertical_flip),
    "crop": (bk.CenterCrop((9, 30)), lambda x: F.center_crop(x, [9, 30])),
    "pad": (bk.Pad((1, 2, -3, 4), fill=0.3), lambda x: F.pad(x, [1, 2, -3, 4], 0.3)),
    "edge": (bk.Pad(3, padding_mode="edge"), lambda x: F.pad(x, [3], padding_mode="edge")),
    "shrink": (bk.Resize((9, 13)), lambda x: F.resize(x, [9, 13])),
    "grow": (bk.Resize((40, 33)), lambda x: F.resize(x, [40, 33])),
    "no-antialias": (
        bk.Resize((9, 13), antialias=False),
        lambda x: F.resize(x, [9, 13], antialias=False),
    ),
    "nearest": (bk.Resize((9, 13), "nearest"), lambda x: F.resize(x, [9, 13], "nearest")),
    "rotate": (
        bk.RandomRotation((30, 30), "bilinear", fill=(0.1, 0.2, 0.3)),
        lambda x: filled(x, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)),
    ),
    "rotate-nearest": (bk.RandomRotation((30, 30)), lambda x: F.rotate(x, 30.0)),
    "affine": (
        bk.RandomAffine((20, 20), None, (0.7, 0.7), (5, 5, -9, -9), "bilinear", None),
        lambda x: F.affine(x, 20.0, [0, 0], 0.7, [5.0, -9.0], "bilinear"),
    ),
    "brightness": (bk.ColorJitter((1.5, 1.5)), lambda x: F.adjust_brightness(x, 1.5)),
    "contrast": (bk.ColorJitter(contrast=(1.5, 1.5)), lambda x: F.adjust_contrast(x, 1.5)),
    "saturation": (bk.ColorJitter(saturation=(1.5, 1.5)), lambda x: F.adjust_saturation(x, 1.5)),
    "grey": (bk.RandomGrayscale(1.0), lambda x: F.rgb_to_grayscale(x, 3)),
    "normalize": (bk.Normalize(MEAN, STD), lambda x: F.normalize(x, MEAN, STD)),
    "dtype": (bk.ToDtype(torch.float32, scale=True), lambda x: F.to_dtype(x, torch.float32, True)),
    "chain": (
        bk.Compose(
            [
                bk.RandomVerticalFlip(1.0),
                bk.Resize((15, 17)),
                bk.ColorJitter((1.2, 1.2)),
                bk.RandomGrayscale(1.0),
                bk.Normalize(MEAN, STD),
            ]
        ),
        lambda x: F.normalize(
            F.rgb_to_grayscale(F.adjust_brightness(F.resize(F.vertical_flip(x), [15, 17]), 1.2), 3),
            MEAN,
            STD,
        ),
    ),
    "two-calls": (
        bk.Compose([bk.ColorJitter((1.2, 1.2)), bk.Resize((9, 9)), bk.Pad(1), bk.Resize(7)]),
        lambda x: F.resize(F.pad(F.resize(F.adjust_brightness(x, 1.2), [9, 9]), [1]), [7]),
    ),
}


def images(dtype: torch.dtype = torch.float64, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 21, 26, generator=generator, dtype=torch.float64).to(dtype)


def gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the result, the gradient of the result's sum weighted by fixed random numbers)."""
    x = x.clone().requires_grad_()
    result = function(x)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    (result * weights.to(result.dtype)).sum().backward()
    assert x.grad is not None
    return result.detach(), x.grad


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_torchvisions(name: str) -> None:
    transform, theirs = CASES[name]
    result, grad = gradient(transform, images())
    expected, expected_grad = gradient(theirs, images())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6)
    assert expected_grad.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["flip", "rotate", "shrink", "two-calls", "chain"])
def test_gradient_in_shorter_dtypes(name: str, dtype: torch.dtype) -> None:
    transform, _ = CASES[name]
    result, grad = gradient(transform, images(dtype))
    _, exact = gradient(transform, images(dtype).double())
    assert grad.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)
    # The native kernels, which run without gradient, give the same images.
    torch.testing.assert_close(transform(images(dtype)), result, rtol=tolerance, atol=tolerance)


def test_gradients_of_every_order_and_direction() -> None:
    chain = bk.Compose(
        [
            bk.RandomResizedCrop(5),
            bk.RandomRotation(20, "bilinear"),
            bk.ColorJitter(0.2, 0.2, 0.2, 0.05),
            bk.Normalize(MEAN, STD),
        ]
    )

    def run(x: Tensor) -> Tensor:
        return chain(x, torch.Generator().manual_seed(3), range(len(x)), "channels_first")

    x = (0.25 + images(n=1)[:, :, :8, :7] / 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x,))
    jacobian = torch.autograd.functional.jacobian(run, x.detach())
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(run, (x.detach(),), (tangent,))
    torch.testing.assert_close(forward, jacobian.sum(dim=(-4, -3, -2, -1)))
    backward = torch.func.grad(lambda x: run(x).sum())(x.detach())
    torch.testing.assert_close(backward, jacobian.sum(dim=(0, 1, 2, 3)))


@pytest.mark.parametrize("form", ["single", "list", "clip", "last"])
def test_gradient_in_every_form_of_images(form: str) -> None:
    x = images(torch.float32, 4).requires_grad_()
    given: Any = {
        "single": lambda: x[0],
        "list": lambda: [x[0], x[1, :, :9], x[2]],
        "clip": lambda: x.view(2, 2, 3, 21, 26),
        "last": lambda: x.movedim(1, -1),
    }[form]()
    result = bk.Compose([bk.CenterCrop(8), bk.RandomHorizontalFlip()])(given)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == result.numel()


def test_without_gradient_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not bigkernel.cpu_isas():
        pytest.skip("the native library is not built")
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")
    x = images(torch.float32).requires_grad_()
    flip = bk.RandomHorizontalFlip(1.0)
    with torch.no_grad():
        assert not flip(x).requires_grad
        assert bigkernel.explain("augment", x).startswith("augment: cpu")
    with torch.inference_mode():
        flip(x)
    flip(x.detach())
    with pytest.raises(RuntimeError, match="the images require a gradient, which PyTorch computes"):
        flip(x)
    assert "require a gradient" in bigkernel.explain("augment", x)


def test_whole_numbers_have_no_gradient() -> None:
    x = images(torch.float32).requires_grad_()
    assert not bk.ToDtype(torch.uint8, scale=True)(x).requires_grad
    assert bk.ToDtype(torch.float16)(x).requires_grad
