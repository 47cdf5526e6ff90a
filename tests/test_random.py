"""The counter-based generator against its published known-answer vectors."""

import pytest
import torch

from bigkernel.random import philox4x32, uniform01

# Random123's kat_vectors for philox4x32-10: counter words, key words, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_matches_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in philox4x32(seed, *counter)) == expected


def test_philox_broadcasts_counters():
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None]
    words = philox4x32(7, columns, rows, 0, 0)
    assert words[0].shape == (3, 5)
    assert int(words[2][1, 4]) == int(philox4x32(7, 4, 1, 0, 0)[2])


def test_uniform01_covers_the_unit_interval():
    values = uniform01(philox4x32(3, torch.arange(100_000), 0, 0, 0)[0])
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert uniform01(torch.tensor([0xFFFFFFFF])).item() < 1
