"""Launch geometry of the batch norm kernels: chosen by occupancy and load width on paper, not yet measured on a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

PROGRAMS = 1024  # fills 132 multiprocessors; a constant, so that the order of a sum does not depend on the device
FUSED_ELEMENTS = 32768  # at most so many per program of the one-launch kernels
TILE, WIDE_TILE = 2048, 4096  # elements of a tile in the sums | fused and apply kernels
SLAB_SHARE = (
    1 / 4
)  # of L2 for what a slab reads twice: two slabs at a time take half, the outputs pass through the rest
SLAB_RUN = 64  # bytes of neighbouring channels_last channels that a slab must have: less would waste what memory sends
SLAB_ROUND = 8192  # what a slab costs beside its elements (its first loads, its counter), in elements per program
SLAB_LEAST = 2 << 20  # bytes of x; below, one launch is not left for its narrow stores or its few programs
SLAB_KINDS = {  # kernel: programs per multiprocessor, bytes per thread and tile; 256 threads
    "forward": (3, 32), "backward": (2, 32), "gates": (2, 16),
}  # fmt: skip
SLAB_THREADS, SLAB_PEEL = 256, 2  # off the vectors at most so many programs per multiprocessor: more would spill
LANES = 64 if torch.version.hip else 32  # threads of a warp


@dataclass(frozen=True)
class Device:
    """What the choice of a path depends on, beside the tensor."""

    processors: int
    l2_bytes: int


INTERPRETER = Device(0, 0)  # no slabs: there programs run one after the other, and would wait for ever


def device_of(x: torch.Tensor) -> Device:
    """On AMD GPUs as in the interpreter: L2 belongs to a die there, and the cache behind it serves second reads."""
    return _gpu(x.get_device()) if x.is_cuda and torch.version.hip is None else INTERPRETER


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


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


def _plane_block(reach: int, least: int, most: int) -> int:
    """The largest block that cuts a plane of ``reach`` elements with little padding."""
    blocks = [b for b in (2048, 1024, 512, 256, 128, 64, most) if least <= b <= most] or [most]
    padded = {b: triton.cdiv(reach, b) * b for b in blocks}
    return next((b for b in blocks if padded[b] <= 1.125 * reach), min(blocks, key=padded.__getitem__))


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
        # not so small that few samples cannot fill a tile
        top = min(_pow2(reach), tile)
        block_s = _plane_block(reach, min(top, tile // _pow2(4 * N)), top)
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
    if per_sample and channels_last and cfg["BLOCK_N"] > 1 and cfg.get("maxnreg") and cfg["num_warps"] == 16:
        # with the sums of all four gates 128 registers do not suffice on sm_80
        cfg |= {"BLOCK_N": cfg["BLOCK_N"] // 2, "num_warps": 8, "maxnreg": 168}
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


@dataclass(frozen=True)
class Slab:
    """Launch of a slab kernel: teams of parts_n * parts_s programs, a chunk of samples and pixels for each."""

    teams: int
    parts_n: int
    parts_s: int
    blocks: int
    sizes: tuple[int, int, int, int, int, int]  # N, C, S, numel, CHUNK_N, CHUNK_S
    config: dict[str, int]
    slab_bytes: int  # what all teams together read twice of a block each

    @property
    def members(self) -> int:
        return self.parts_n * self.parts_s

    @property
    def programs(self) -> int:
        return self.teams * self.members


def _occupancy(kind: str, peel: bool) -> tuple[int, int]:
    """Programs per multiprocessor, bytes per thread."""
    programs, thread_bytes = SLAB_KINDS[kind]
    return min(programs, SLAB_PEEL) if peel else programs, thread_bytes


def _slab_config(
    N: int, C: int, S: int, channels_last: bool, itemsize: int, block_c: int, kind: str
) -> dict[str, int] | None:
    """Blocks of a slab kernel for so many channels, or None where they do not make whole vectors."""
    vec = 16 // itemsize
    peel = not channels_last and S % vec != 0
    per_processor, thread_bytes = _occupancy(kind, peel)
    tile = SLAB_THREADS * thread_bytes // itemsize
    if (channels_last and C % vec) or (peel and (C * S % vec or block_c * S % vec)):
        return None
    reach = S + vec - 1 if peel else S
    if channels_last:
        block_s = min(_pow2(S), tile // block_c)
    else:
        block_s = _plane_block(reach, 64, min(_pow2(reach), tile // block_c))
    columns = min(_pow2(block_c * S), 512, tile)
    cfg = {
        "VEC": vec, "CHANNELS_LAST": channels_last, "PEEL": peel,
        "BLOCK_N": min(_pow2(N), tile // (block_c * block_s)), "BLOCK_C": block_c, "BLOCK_S": block_s,
        "BLOCK_K": columns, "BLOCK_R": min(_pow2(N), tile // columns), "num_warps": _num_warps(SLAB_THREADS),
    }  # fmt: skip
    if torch.version.hip is None:
        # so that as many programs as the grid counts on fit a multiprocessor of 64 K registers
        cfg["maxnreg"] = min(65536 // (per_processor * SLAB_THREADS) // 8 * 8, 248)
    return cfg


@functools.lru_cache(maxsize=1024)
def slab_plan(
    N: int, C: int, S: int, channels_last: bool, itemsize: int, kind: str, device: Device, judged_by_y: bool = False,
    add: bool = False,
) -> Slab | None:  # fmt: skip
    """How a slab kernel runs, or None if no slab of whole channels, read twice, stays in L2.

    ``kind`` is "forward", "backward" or "gates" (a backward with sums per sample).  A backward may need y to judge the
    ReLU (``judged_by_y``) and write dresidual (``add``), which then stands in for dy and y where sums can write whole
    vectors of it.  None too where 16-byte loads are not to be had: channels_last with a ragged C, whose rows only the
    three launches can join, and NCHW planes off the vectors of which no block of channels makes whole ones.
    """
    if channels_last and kind != "gates":
        N, S = 1, N * S
    peel = not channels_last and S * itemsize % 16 != 0
    programs = device.processors * _occupancy(kind, peel)[0]
    tensors = 1 if kind == "forward" else 2 + (judged_by_y and (peel or not add))
    best = None
    for block_c in (1, 2, 4, 8, 16, 32, 64, 128):
        if block_c >= 2 * C or (channels_last and block_c * itemsize < SLAB_RUN and block_c < C):
            continue
        if channels_last and kind == "gates" and block_c * itemsize > SLAB_RUN:  # it would spill
            continue
        cfg = _slab_config(N, C, S, channels_last, itemsize, block_c, kind)
        if cfg is None:
            continue
        blocks = triton.cdiv(C, block_c)
        bytes_per_team = min(block_c, C) * N * S * itemsize * tensors
        most = min(int(device.l2_bytes * SLAB_SHARE) // bytes_per_team, programs, blocks)
        for teams in range(most, 0, -1):
            chunk_n, chunk_s, parts_n, parts_s = _team(N, S, programs // teams, cfg)
            tiles = triton.cdiv(chunk_n, cfg["BLOCK_N"]) * triton.cdiv(chunk_s, cfg["BLOCK_S"])
            work = tiles * cfg["BLOCK_N"] * cfg["BLOCK_C"] * cfg["BLOCK_S"]
            cost = triton.cdiv(blocks, teams) * (work + SLAB_ROUND)
            offsets = 3 * blocks * block_c * parts_n * parts_s  # of partial sums, int32
            if offsets < 2**31 and (best is None or cost < best[0]):
                cfg_p = {"BLOCK_P": min(_pow2(parts_n * parts_s), max(1, SLAB_THREADS // block_c))}
                sizes = (N, C, S, N * C * S, chunk_n, chunk_s)
                best = cost, Slab(teams, parts_n, parts_s, blocks, sizes, cfg | cfg_p, teams * bytes_per_team)
    return best and best[1]


def _team(N: int, S: int, want: int, cfg: dict[str, int]) -> tuple[int, int, int, int]:
    """Chunks of samples and of a plane for at most ``want`` members, and how many of each."""
    tiles_n, tiles_s = triton.cdiv(N, cfg["BLOCK_N"]), triton.cdiv(S, cfg["BLOCK_S"])
    chunk_n = triton.cdiv(tiles_n, min(tiles_n, want)) * cfg["BLOCK_N"]
    parts_n = triton.cdiv(N, chunk_n)
    chunk_s = triton.cdiv(tiles_s, min(tiles_s, max(1, want // parts_n))) * cfg["BLOCK_S"]
    return chunk_n, chunk_s, parts_n, triton.cdiv(S, chunk_s)


def choose(
    N: int, C: int, S: int, channels_last: bool, itemsize: int, kind: str, device: Device, *,
    cumulative: bool = False, need_dx: bool = True, judged_by_y: bool = False, add: bool = False,
) -> str | Slab:  # fmt: skip
    """The path of a call: "one launch", a :class:`Slab`, or "three launches".

    ``kind`` is "forward" (in training), "backward" or "gates", a backward that makes sums per sample.

        small layers            one launch; from SLAB_LEAST on slabs, if planes lie off the vectors (7 x 7: one launch
                                stores them element by element) or channels are too few for two programs a processor
        large layers            slabs if there is a plan (:func:`slab_plan` says where there is none), else three
        cumulative averages     never one launch: every program would need the count that one of them changes
        a backward without dx   never slabs: it reads nothing twice
    """
    small = None if cumulative else _fused(N, C, S, channels_last, itemsize, kind == "gates")
    if small:
        narrow = not channels_last and S * itemsize % 16 != 0
        starved = small[0][0] < 2 * device.processors
        if N * C * S * itemsize < SLAB_LEAST or not (narrow or starved):
            return "one launch"
    plan = slab_plan(N, C, S, channels_last, itemsize, kind, device, judged_by_y, add) if need_dx else None
    return plan or ("one launch" if small else "three launches")
