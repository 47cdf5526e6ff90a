"""A transform of one's own beside bigkernel's: a Gaussian blur of random strength.

    python examples/own_transform.py --images 64 --size 128

Its draws are keyed by (seed, id) as those of bigkernel's transforms are, so an image gets the same
blur in every batch, order and process. The class can be the Trainer's `augmentation=`.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from bigkernel import transforms as T
from bigkernel.random import philox4x32, uniform01

PLACE = 1000  # names this transform among all that draw from one seed


class BlurAfter:
    """A chain of bigkernel's transforms, then a blur of each image by a sigma of its own."""

    def __init__(self, chain: T.Transform, sigma: tuple[float, float], radius: int = 4) -> None:
        self.chain, self.sigma, self.radius = chain, sigma, radius

    def sigmas(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """[N], between the two numbers of ``sigma``."""
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        low, high = self.sigma
        return low + (high - low) * uniform01(philox4x32(seed, ids, PLACE, 0, 0)[0])

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None, ids: Tensor | None = None
    ) -> Tensor:
        ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids)
        x = self.chain(images, generator=generator, ids=ids)  # float [N, C, H, W]
        sigmas = self.sigmas(ids, generator).to(x.device, x.dtype)
        reach = torch.arange(-self.radius, self.radius + 1, device=x.device, dtype=x.dtype)
        weights = torch.exp(-(reach**2) / (2 * sigmas[:, None] ** 2))
        weights = weights / weights.sum(1, keepdim=True)  # [N, 2 radius + 1]
        n, c, h, w = x.shape
        kernel = weights.repeat_interleave(c, 0)[:, None]  # one for each channel of each image
        r = self.radius
        y = pad(x, (r, r, r, r), mode="reflect").view(1, n * c, h + 2 * r, w + 2 * r)
        y = conv2d(y, kernel[:, :, None, :], groups=n * c)  # along x
        return conv2d(y, kernel[:, :, :, None], groups=n * c).view(n, c, h, w)  # along y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()

    to_float = T.ToDtype(torch.float32, scale=True)
    chain = T.Compose([T.RandomResizedCrop(options.size), T.RandomHorizontalFlip(), to_float])
    augment = BlurAfter(chain, sigma=(0.1, 2.0))
    size = (options.images, 3, 2 * options.size, 2 * options.size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    ids = torch.arange(options.images)

    whole = augment(images, torch.Generator().manual_seed(0), ids)
    half = augment(images[1::2], torch.Generator().manual_seed(0), ids[1::2])
    same = torch.equal(whole[1::2], half) or torch.allclose(whole[1::2], half, atol=1e-6)
    print(f"{tuple(whole.shape)}; the same in a batch of half the size: {same}")


if __name__ == "__main__":
    main()
