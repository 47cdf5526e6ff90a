"""A transform of one's own in a chain of bigkernel's: a Gaussian blur of random strength.

    python examples/own_transform.py --images 64 --size 128

Its numbers are keyed by (seed, id) as those of bigkernel's transforms are, so an image gets the
same blur in every batch, order and process. The chain can be the Trainer's `augmentation=`.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from bigkernel import transforms as T


class GaussianBlur(T.Transform):
    """Blurs images, each by a sigma of its own, between the two numbers of ``sigma``."""

    blocks = 1  # of four random numbers, for each image

    def __init__(self, radius: int = 4, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        self.radius, self.sigma = radius, sigma

    def transform(self, images: Tensor, u: Tensor) -> Tensor:
        n, c, h, w = images.shape
        low, high = self.sigma
        sigmas = low + (high - low) * u[0, :, 0]
        reach = torch.arange(-self.radius, self.radius + 1, device=u.device)
        weights = torch.softmax(-(reach**2) / (2 * sigmas[:, None] ** 2), 1)  # [N, 2 radius + 1]
        y = images if images.is_floating_point() else images.float()
        kernel = weights.to(y.dtype).repeat_interleave(c, 0)[:, None]  # for each channel and image
        y = pad(y, [self.radius] * 4, mode="reflect").flatten(0, 1)[None]
        y = conv2d(y, kernel[:, :, None, :], groups=n * c)  # along x
        y = conv2d(y, kernel[:, :, :, None], groups=n * c).view(n, c, h, w)  # along y
        return y if images.is_floating_point() else y.round().to(images.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()

    to_float = T.ToDtype(torch.float32, scale=True)
    augment = T.Compose(
        [T.RandomResizedCrop(options.size), T.RandomHorizontalFlip(), to_float, GaussianBlur()]
    )
    size = (options.images, 3, 2 * options.size, 2 * options.size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    ids = torch.arange(options.images)

    whole = augment(images, torch.Generator().manual_seed(0), ids)
    half = augment(images[1::2], torch.Generator().manual_seed(0), ids[1::2])
    same = torch.allclose(whole[1::2], half, atol=1e-6)
    print(f"{tuple(whole.shape)}; the same in a batch of half the size: {same}")


if __name__ == "__main__":
    main()
