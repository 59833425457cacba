"""Launch geometry of the batch norm kernels: chosen by occupancy and load width on paper, not yet measured on a GPU."""

from __future__ import annotations

import torch
import triton

PROGRAMS = 1024  # fills 132 multiprocessors; a constant, so that the order of a sum does not depend on the device
FUSED_ELEMENTS = 32768  # at most so many per program of the one-launch kernels
TILE, WIDE_TILE = 2048, 4096  # elements of a tile in the sums | fused and apply kernels
LANES = 64 if torch.version.hip else 32  # threads of a warp


def _pow2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _vector(itemsize: int, n: int) -> int:
    """Elements of the widest load, at most 16 bytes, of which n is a multiple."""
    vec = 16 // itemsize
    while n % vec:
        vec //= 2
    return vec


def _num_warps(threads: int) -> int:
    return max(1, min(512, threads) // LANES)


def sums_config(N: int, C: int, S: int, channels_last: bool, itemsize: int, fused: bool = False) -> dict[str, int]:
    """Blocks of the kernels that walk over planes (n, c, s)."""
    tile = WIDE_TILE if fused else TILE
    if channels_last:
        vec, peel = _vector(itemsize, C), False
        block_c = min(_pow2(C), 32 // itemsize if fused else 64)  # a sector | a line or two
        block_s = min(_pow2(S), tile // block_c)
    else:
        vec = _vector(itemsize, N * C * S)
        peel = S % vec != 0
        reach = S + vec - 1 if peel else S
        # the largest block with little padding, but not so small that few samples cannot fill a tile
        top = min(_pow2(reach), tile)
        blocks = [b for b in (2048, 1024, 512, 256, 128, 64, top) if min(top, tile // _pow2(4 * N)) <= b <= top]
        padded = {b: triton.cdiv(reach, b) * b for b in blocks}
        block_s = next((b for b in blocks if padded[b] <= 1.125 * reach), min(blocks, key=padded.__getitem__))
        # neighbouring small planes share cache lines
        block_c = min(_pow2(C), max(1, tile // _pow2(N * S) if fused else tile // 4 // block_s))
    block_n = min(_pow2(N), tile // (block_c * block_s))
    elements = block_n * block_c * block_s
    cfg = {
        "VEC": vec, "CHANNELS_LAST": channels_last, "PEEL": peel,
        "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_S": block_s,
        "num_warps": _num_warps(elements // (8 if fused else 16)),
    }  # fmt: skip
    if fused and torch.version.hip is None:
        cfg["maxnreg"] = 128  # all that 16 warps can have; left alone, ptxas spills a few to fit one more block
    return cfg


def chunks(N: int, C: int, S: int, cfg: dict[str, int]) -> tuple[tuple[int, int, int], int, int]:
    """Grid of a sums kernel (channel blocks, chunks of samples, chunks of a plane), and the sizes of the chunks."""
    blocks = triton.cdiv(C, cfg["BLOCK_C"])
    want = triton.cdiv(PROGRAMS, blocks)
    tiles_n, tiles_s = triton.cdiv(N, cfg["BLOCK_N"]), triton.cdiv(S, cfg["BLOCK_S"])
    chunk_n = triton.cdiv(tiles_n, min(tiles_n, want)) * cfg["BLOCK_N"]
    parts_n = triton.cdiv(N, chunk_n)
    chunk_s = triton.cdiv(tiles_s, min(tiles_s, triton.cdiv(want, parts_n))) * cfg["BLOCK_S"]
    return (blocks, parts_n, triton.cdiv(S, chunk_s)), chunk_n, chunk_s


def finalise_config(P: int, C: int) -> dict[str, int]:
    return {"BLOCK_P": min(_pow2(P), 128), "BLOCK_C": min(_pow2(C), 8), "num_warps": _num_warps(128)}


def apply_config(rows: int, cols: int, itemsize: int, repeat: bool) -> dict[str, int]:
    block_k = min(_pow2(cols), 512, WIDE_TILE)
    block_r = min(_pow2(rows), WIDE_TILE // block_k)
    return {
        "REPEAT": repeat, "VEC": _vector(itemsize, cols), "BLOCK_R": block_r, "BLOCK_K": block_k,
        "num_warps": _num_warps(min(128, block_r * block_k // 16)),
    }  # fmt: skip


def _fused(N: int, C: int, S: int, channels_last: bool, itemsize: int, per_sample: bool) -> tuple | None:
    """Grid, sizes and blocks of a one-launch kernel, or None if the layer is too large for it."""
    if channels_last and not per_sample:
        N, S = 1, N * S
    cfg = sums_config(N, C, S, channels_last, itemsize, fused=True)
    if N * S * cfg["BLOCK_C"] > FUSED_ELEMENTS:
        return None
    return (triton.cdiv(C, cfg["BLOCK_C"]),), (N, C, S, N * C * S, N, S), cfg


def _split(N: int, C: int, S: int, channels_last: bool, itemsize: int, per_sample: bool) -> tuple:
    """Grid, sizes and blocks of a sums kernel, and how many times its channels repeat.

    channels_last samples are one long plane unless sums per sample are wanted.  A ragged C is made whole vectors by
    taking neighbouring rows for more channels: the finalise kernel reads partials (P, repeat * C) as (P * repeat, C).
    With sums per sample that needs an even H * W; 7 x 7 with a ragged C is read element by element.
    """
    repeat = 1
    if channels_last:
        if not per_sample:
            N, S = 1, N * S
        while C * repeat * itemsize % 16 and S % (2 * repeat) == 0:
            repeat *= 2
        C, S = C * repeat, S // repeat
    cfg = sums_config(N, C, S, channels_last, itemsize)
    grid, chunk_n, chunk_s = chunks(N, C, S, cfg)
    return grid, (N, C, S, N * C * S, chunk_n, chunk_s), cfg, repeat


def _matrix(N: int, C: int, S: int, channels_last: bool, itemsize: int) -> tuple:
    """Grid, sizes and blocks of an apply kernel."""
    rows, cols = (N * S, C) if channels_last else (N, C * S)
    once = cols
    while cols * itemsize % 16 and rows % 2 == 0:
        rows, cols = rows // 2, cols * 2
    cfg = apply_config(rows, cols, itemsize, cols != once)
    blocks, tiles = triton.cdiv(cols, cfg["BLOCK_K"]), triton.cdiv(rows, cfg["BLOCK_R"])
    chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, blocks))) * cfg["BLOCK_R"]
    return (blocks, triton.cdiv(rows, chunk)), (rows, cols, C, 1 if channels_last else S, chunk), cfg
