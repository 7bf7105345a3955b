"""In which tiles a product of many rows is computed: the shapes of kernels/mma.cuh and wgmma.cuh, and which is fastest."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

F32 = np.dtype(np.float32)
PROCESSORS = 132  # of an H100
# Most with which launches in a recording overlap: prompts of 512 and 1,024 tokens take 8 and 4 % less, those of 2,048 2 % more.
OVERLAP_ROWS = 1024


class Tile(NamedTuple):
    """A shape of kernels/mma.cuh or wgmma.cuh: outputs of a block, its threads, bytes of shared memory; what an SM of an H100
    reaches with one block, and with as many as it holds, as parts of what it reaches with the best shape of mma.cuh
    (kernels/LOG.md). With `box`, rows of weights that a copy brings, blocks come in pairs, one above the other, and stay for
    all tiles."""

    rows: int
    columns: int
    threads: int
    shared_bytes: int
    alone: float
    together: float
    box: int = 0

    def blocks(self, rows: int, columns: int) -> int:
        """How many tiles these outputs are, with those that make the last pair complete."""
        pair = 2 if self.box else 1
        return pair * -(-rows // (pair * self.rows)) * -(-columns // self.columns)


@functools.lru_cache(256)
def shapes(x_type: np.dtype, width: int, head: int = 0, wgmma: bool = False) -> dict[str, Tile]:
    """The shapes for rows of `width` elements of this type, with whole heads of `head` elements; those of wgmma.cuh too if
    asked for."""

    def tile(rows: int, columns: int, threads: int, depth: int, stages: int, alone: float, together: float) -> Tile:
        shared_bytes = stages * depth * (rows * x_type.itemsize + columns * 2)
        return Tile(rows, columns, threads, shared_bytes, alone, together)

    def fed_tile(columns: int, stages: int, box: int, fastest: float, rest: int, alone: float = 1.0) -> Tile:
        speed = fastest * width / (width + rest)  # `rest`: what begins and ends a tile, in elements of a row
        return Tile(128, columns, 384, stages * 128 * (128 + columns) + 256 + 8 * 2560, alone * speed, speed, box)

    few = head or 32
    few_stages = 6 if few == 32 else 4
    if x_type == F32:
        wide, middle = tile(128, 128, 256, 32, 3, 1.0, 1.0), tile(64, 128, 128, 32, 3, 1.2, 0.9)
        return {"mma_wide": wide, "mma_middle": middle, "mma_few": tile(32, few, 128, 64, few_stages, 0.3, 0.4)}
    middle = tile(64, 128, 128, 64, 4, 0.5, 0.75) if head == 128 else tile(64, 64, 128, 64, 6, 0.39, 0.6)
    result = {
        "mma_wide": tile(128, 128, 128, 64, 3, 0.75, 1.0),
        "mma_middle": middle,
        "mma_few": tile(32, few, 128, 64, few_stages, 0.15, 0.25),
    }
    if wgmma:
        result["wgmma_wide"] = fed_tile(256, 4, 64 if head else 128, 2.17, 1050)
        result["wgmma_turns"] = fed_tile(128, 6, 64, 1.73, 480, alone=0.9)
        result["wgmma_middle"] = fed_tile(128, 6, 64, 1.70, 565)
        if not head:
            result["wgmma_few"] = fed_tile(64, 8, 32, 1.2, 600)
    return result


@functools.lru_cache(4096)
def choose(x_type: np.dtype, width: int, head: int, wgmma: bool, rows: int, columns: int) -> str:
    """The one of `shapes` with which the busiest SM is done first. Up to 32 rows fetching the weights is all."""
    of = shapes(x_type, width, head, wgmma)

    def time(shape: str) -> float:
        tile = of[shape]
        busiest = -(-tile.blocks(rows, columns) // PROCESSORS)
        return busiest * tile.rows * tile.columns / (tile.alone if busiest == 1 else tile.together)

    return "mma_few" if rows <= 32 else min(of, key=time)
