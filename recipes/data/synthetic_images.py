"""A synthetic set of images whose labels depend only on where patches lie relative to one another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

NOISE_STD = 0.1


def generator_from(*parts: object) -> np.random.RandomState:
    """A generator seeded from a hash of `parts`: RandomState, as numpy never changes its streams."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


class SyntheticImageDataset:
    """Images of a grid of identical patches, under noise, some of which are replaced by pairs of patterns A and B. In all pairs
    of an image B has the same offset from A, and the label is which of `num_classes` offsets.

    Item i is a pure function of (seed, i). All labels are equally likely, and every image has the same number of A and B:
    without positions the patches carry no information about the label, and a model without positions cannot do better
    than 1 / num_classes. The offsets are the shortest ones, of length 1, sqrt(2), 2 ...
    """

    def __init__(
        self,
        num_samples: int = 1000,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
        seed: int = 0,
    ) -> None:
        """ValueError if the grid of patches is not whole, or has fewer offsets than classes."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height} x {width} is not a whole number of patches of patch_size {patch_size}")
        self.num_samples, self.patch_size, self.in_channels, self.seed = num_samples, patch_size, in_channels, seed
        self.num_classes, self.grid = num_classes, (height // patch_size, width // patch_size)
        down, across = np.mgrid[1 - self.grid[0] : self.grid[0], 1 - self.grid[1] : self.grid[1]].reshape(2, -1)
        squared_length = down**2 + across**2
        self.offsets = np.stack([down, across], 1)[np.lexsort((across, down, squared_length))][1:]  # without (0, 0)
        if not 1 < num_classes <= len(self.offsets):
            raise ValueError(
                f"num_classes {num_classes} must be from 2 to {len(self.offsets)}, the offsets between two of the "
                f"{self.grid[0]} x {self.grid[1]} patches"
            )
        # A pair rules out at most two others of its offset: a third of the possible pairs always fits, in any order drawn.
        possible = [(self.grid[0] - abs(down)) * (self.grid[1] - abs(across)) for down, across in self.offsets[:num_classes]]
        self.pairs = max(1, min(-(-min(possible) // 3), self.grid[0] * self.grid[1] // 4))
        # Of the background, of A, of B. The background is not noise alone: a norm layer would scale it up to the size of A.
        patterns = generator_from("patterns", patch_size, in_channels).randint(0, 2, (3, in_channels, patch_size, patch_size))
        self.patterns = patterns.astype(np.float32)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        import torch

        if not 0 <= i < self.num_samples:
            raise IndexError(f"item {i} of {self.num_samples}")
        random, (rows, columns), side = generator_from(self.seed, "synthetic image", i), self.grid, self.patch_size
        label = random.randint(self.num_classes)
        image = np.tile(self.patterns[0], (1, rows, columns))
        for pattern, places in zip(self.patterns[1:], self._places(label, random), strict=True):
            for row, column in places:
                image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = pattern
        noise = random.standard_normal(image.shape).astype(np.float32)
        return torch.from_numpy(image + np.float32(NOISE_STD) * noise), int(label)

    def _places(self, label: int, random: np.random.RandomState) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(row, column) of each A, and of its B. Places for A are tried in random order, and taken if that of B is free too."""
        rows, columns = self.grid
        down, across = self.offsets[label]
        all_a: list[tuple[int, int]] = []
        all_b: list[tuple[int, int]] = []
        taken = np.zeros(self.grid, dtype=bool)
        for place in random.permutation(rows * columns):
            a = divmod(int(place), columns)
            b = (a[0] + int(down), a[1] + int(across))
            on_grid = 0 <= b[0] < rows and 0 <= b[1] < columns
            if on_grid and not taken[a] and not taken[b] and len(all_a) < self.pairs:
                taken[a] = taken[b] = True
                all_a.append(a)
                all_b.append(b)
        return all_a, all_b
