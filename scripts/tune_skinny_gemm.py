#!/usr/bin/env python3
"""Time every candidate tile of the skinny products on this GPU, beside cuBLAS; print what to pin.

    python scripts/tune_skinny_gemm.py                       all shapes, into kernels/tuning
    python scripts/tune_skinny_gemm.py --only 8b --rows 1,8,64
    python scripts/tune_skinny_gemm.py --shape 6144x2048 --shape 16384x2048:gated

Kernels are compiled first, by as many processes as there are cores, and only what was compiled in
time is tried. A candidate must give the right result, twice the same one, before it is timed: in a
CUDA graph of many launches, each on weights that the L2 cache cannot hold any more.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import activation
from kernels.skinny_gemm import (
    Tile,
    arrival_counters,
    skinny_gated,
    skinny_gated_reference,
    skinny_linear,
    skinny_linear_reference,
)

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "tuning" / "skinny_gemm_h200.py"
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)
FOLLOWERS = (2, 4, 24, 48)  # rows for which only the neighbours' fastest candidates are tried
NUM_SMS = 132
DEVICE = "cuda"
SHARED_BYTES = 227 * 1024
ROTATED_BYTES = 400 << 20  # weights read between two uses of the same one
MAX_ERROR = 1e-2  # of the result's norm
MIN_GAIN = 0.995  # of the time before: less is noise
CANDIDATES_IN_A_ROW = 8


class Shape(NamedTuple):
    """One product of a model."""

    name: str
    N: int
    K: int
    kind: str = "plain"  # or "gated", or "head": results in float32


LAYERS = (  # the products of a layer in their order; heads stand alone
    (
        Shape("8b qkv", 6144, 4096),
        Shape("8b o", 4096, 4096),
        Shape("8b gate_up", 28672, 4096, "gated"),
        Shape("8b down", 4096, 14336),
    ),
    (
        Shape("0.6b qkv", 4096, 1024),
        Shape("0.6b o", 1024, 2048),
        Shape("0.6b gate_up", 6144, 1024, "gated"),
        Shape("0.6b down", 1024, 3072),
    ),
    (Shape("8b head", 128256, 4096, "head"),),
    (Shape("0.6b head", 151936, 1024, "head"),),
)


class Case(NamedTuple):
    """One kernel variant on one shape; what a compiling process is given."""

    shape: Shape
    rows: int  # a power of two
    tile: Tile


def padded_rows(rows: int, tile: Tile) -> int:
    """The number of rows that a kernel is compiled for: a power of two."""
    return max(tile.fewest_rows(), 1 << (rows - 1).bit_length())


def vector_tiles(shape: Shape, rows: int) -> Iterator[Tile]:
    """Candidates without tensor cores, for up to four rows."""
    gate = 2 if shape.kind == "gated" else 1
    sizes = itertools.product((1, 2, 4), (512, 1024, 2048), (2, 4, 8), (1, 3), (0, 1))
    for features, block_k, num_warps, stages, prefetch in sizes:
        block_n = features * gate
        per_thread = block_n * block_k // (32 * num_warps)
        if block_k > shape.K or not 8 <= per_thread <= 64 or per_thread * rows > 64:
            continue
        if block_k == shape.K and (stages > 1 or prefetch):
            continue  # no second turn
        if shape.N // block_n < NUM_SMS or (stages > 1 and prefetch):
            continue
        yield Tile(False, block_n, block_k, 1, 1, num_warps, stages, prefetch)


# block_n, block_k, slices, warps
SLICED = ((16, 256, 4, 4), (16, 512, 4, 4), (32, 256, 4, 4), (32, 512, 8, 8))
WHOLE = ((64, 128, 1, 4), (64, 64, 1, 4), (128, 64, 1, 4), (128, 128, 1, 8))


def dot_tiles(shape: Shape, rows: int) -> Iterator[Tile]:
    """Candidates on tensor cores."""
    blocks = (SLICED if rows <= 32 else ()) + WHOLE
    for (block_n, block_k, slices, warps), split_k, stages, prefetch in itertools.product(
        blocks, (1, 2, 4, 8), (3, 4, 6), (0, 3)
    ):
        tile = Tile(True, block_n, block_k, slices, split_k, warps, stages, prefetch)
        if _dot_fits(shape, padded_rows(rows, tile), tile):
            yield tile


def _dot_fits(shape: Shape, rows: int, tile: Tile) -> bool:
    programs = -(-shape.N // tile.block_n) * tile.split_k
    turns = -(-shape.K // (tile.block_k * tile.split_k))
    stages = tile.num_stages if tile.slices == 1 else tile.num_stages - 1
    shared = stages * (tile.block_n + rows) * tile.block_k * 2
    if shape.K % tile.block_k or turns < 2 or shared > SHARED_BYTES or programs < 48:
        return False
    if tile.split_k > 1 and (tile.slices > 1 or not NUM_SMS * 0.45 <= programs <= NUM_SMS * 3):
        return False
    if tile.num_stages > turns + 2:
        return False
    resident = min(programs, NUM_SMS * (SHARED_BYTES // shared)) / NUM_SMS
    weights = resident * tile.block_n * tile.block_k * 2  # bytes of one turn in an SM
    depth = min(turns, stages)
    # Enough under way to cover the memory's latency; not so much called ahead that it is evicted.
    enough = min(32 * 1024, shape.N * shape.K * 2 // NUM_SMS // 4)
    return weights * depth >= enough and weights * tile.prefetch <= 192 * 1024


def product(shape: Shape, x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """What the engine would run."""
    if shape.kind == "gated":
        return skinny_gated(x, weight, activation=activation.SILU, tile=tile)
    out_dtype = torch.float32 if shape.kind == "head" else None
    return skinny_linear(x, weight, out_dtype=out_dtype, tile=tile)


def cublas(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    """What it runs otherwise."""
    y = F.linear(x, weight)
    if shape.kind == "gated":
        return activation.silu_and_mul(y)
    return y.float() if shape.kind == "head" else y


# --- compiling ---------------------------------------------------------------------------------


class Hopper:
    """What a launch asks of a driver before it compiles; no GPU is touched."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H100 or H200."""
        return GPUTarget("cuda", 90, 32)


def stop_after_compiling() -> None:
    """Make every launch of this process end after its compilation."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    driver.set_active(Hopper())
    torch.set_num_threads(1)


def compile_case(case: Case) -> tuple[Case, str]:
    """Compile one variant into Triton's cache; returns what went wrong, if anything."""
    x = torch.empty(case.rows, case.shape.K, dtype=torch.bfloat16)
    weight = torch.empty(case.shape.N, case.shape.K, dtype=torch.bfloat16)
    try:
        product(case.shape, x, weight, case.tile)
    except Exception as err:  # a candidate that does not compile is one candidate less
        return case, f"{type(err).__name__}: {err}"
    return case, ""


def compile_all(cases: list[Case], seconds: float) -> set[Case]:
    """Compile in all cores for at most ``seconds``; return the cases that are ready."""
    ready: set[Case] = set()
    failed = 0
    deadline = time.monotonic() + seconds
    num_processes = max(1, min(14, (os.cpu_count() or 2) - 1))
    variants: dict[object, list[Case]] = {}  # the dot form's K is no constant: shapes share it
    for case in cases:
        K = None if case.tile.dot else case.shape.K
        variants.setdefault((K, case.shape.kind, case.rows, case.tile), []).append(case)
    with multiprocessing.get_context("fork").Pool(num_processes, stop_after_compiling) as pool:
        firsts = {same[0]: same for same in variants.values()}
        results = pool.imap_unordered(compile_case, list(firsts))
        for _ in firsts:
            try:
                case, error = results.next(timeout=max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            failed += bool(error)
            if error:
                print(f"does not compile: {case}: {error[:200]}", file=sys.stderr)
            else:
                ready.update(firsts[case])
        pool.terminate()
    print(f"{len(ready)} of {len(cases)} cases, {len(firsts)} kernels, {failed} failed", flush=True)
    return ready


# --- timing ------------------------------------------------------------------------------------


def graph_us(run: Callable[[], object]) -> float:
    """What a graph of ``run`` takes on the GPU: the median of its replays, in microseconds."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


class Bench:
    """One shape's weights and rows on the GPU."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        bytes_each = shape.N * shape.K * 2
        self.num_sets = max(2, min(48, -(-ROTATED_BYTES // bytes_each)))
        self.num_launches = self.num_sets * max(1, 48 // self.num_sets if bytes_each < 4e7 else 1)
        self.weights = [
            torch.randn(shape.N, shape.K, device=DEVICE, dtype=torch.bfloat16) / shape.K**0.5
            for _ in range(self.num_sets)
        ]
        self.x = torch.randn(256, shape.K, device=DEVICE, dtype=torch.bfloat16)
        self.bytes = bytes_each
        reference = skinny_linear_reference(self.x, self.weights[0], out_dtype=torch.float32)
        if shape.kind == "gated":
            silu = activation.SILU
            reference = skinny_gated_reference(self.x, self.weights[0], None, silu).float()
        self.reference = reference

    def check(self, rows: int, tile: Tile) -> bool:
        """Whether the result is right, and the same when asked again."""
        x = self.x[:rows]
        first, again = (product(self.shape, x, self.weights[0], tile) for _ in range(2))
        error = (first.float() - self.reference[:rows]).norm() / self.reference[:rows].norm()
        return bool(error < MAX_ERROR) and torch.equal(first, again)

    def microseconds(self, run: Callable[[Tensor], object]) -> float:
        """One launch's time, among many of them on different weights."""
        run(self.weights[0])
        turns = [self.weights[i % self.num_sets] for i in range(self.num_launches)]
        return graph_us(lambda: [run(weight) for weight in turns]) / self.num_launches

    def time_tile(self, rows: int, tile: Tile) -> float | None:
        """Microseconds, or None where the result is wrong or the launch fails."""
        try:
            if not self.check(rows, tile):
                print(f"WRONG: {self.shape.name} M={rows} {tuple(tile)}", flush=True)
                return None
            return self.microseconds(lambda w: product(self.shape, self.x[:rows], w, tile))
        except (RuntimeError, TritonError) as err:
            print(f"fails: {self.shape.name} M={rows} {tuple(tile)}: {err}"[:200], flush=True)
            return None


class Result(NamedTuple):
    """What one shape takes at one number of rows, fastest candidates first."""

    shape: Shape
    rows: int
    cublas_us: float
    tiles: list[tuple[float, Tile]]

    def line(self) -> str:
        """One line of the printed table."""
        text = f"{self.shape.name:13s} M={self.rows:<3d} cuBLAS {self.cublas_us:6.1f}"
        if not self.tiles:
            return text
        rate = self.shape.N * self.shape.K * 2 / self.tiles[0][0] / 1e6
        fastest = " | ".join(f"{us:.2f} {_short(tile)}" for us, tile in self.tiles[:3])
        return f"{text} ours {rate:.2f} TB/s: {fastest}"


def _short(tile: Tile | None) -> str:
    if tile is None:
        return "cuBLAS"
    return ("dot " if tile.dot else "vec ") + ",".join(map(str, tile[1:]))


class Layer:
    """The products of one layer, which follow each other in a step as they do here.

    What is fastest alone may be slow behind another kernel that leaves it no room, so the choice
    among the fastest candidates is made in the row.
    """

    def __init__(self, benches: list[Bench]) -> None:
        self.benches = benches
        self.num_layers = max(4, -(-ROTATED_BYTES // sum(b.bytes for b in benches)))

    def microseconds(self, rows: int, tiles: list[Tile | None]) -> float:
        """One layer's time; None is cuBLAS."""

        def run() -> None:
            for i in range(self.num_layers):
                for bench, tile in zip(self.benches, tiles, strict=True):
                    x, weight = bench.x[:rows], bench.weights[i % bench.num_sets]
                    if tile is None:
                        cublas(bench.shape, x, weight)
                    else:
                        product(bench.shape, x, weight, tile)

        return graph_us(run) / self.num_layers

    def choose(self, rows: int, results: list[Result]) -> list[Tile | None]:
        """The tiles to pin: each product's turn by turn, the others staying as they are."""
        candidates = [[t for _, t in result.tiles[:CANDIDATES_IN_A_ROW]] for result in results]
        tiles: list[Tile | None] = [c[0] if c else None for c in candidates]
        by_cublas = self.microseconds(rows, [None] * len(tiles))
        best = self.microseconds(rows, tiles)
        for _, i in itertools.product(range(2), range(len(tiles))):
            for tile in [*candidates[i], None]:
                trial = [*tiles[:i], tile, *tiles[i + 1 :]]
                if tile != tiles[i] and (us := self.microseconds(rows, trial)) < best * MIN_GAIN:
                    best, tiles = us, trial
        alone = sum(result.tiles[0][0] for result in results if result.tiles)
        choice = " | ".join(map(_short, tiles))
        print(
            f"layer of {self.benches[0].shape.name.split()[0]} M={rows}: cuBLAS {by_cublas:.2f}, "
            f"sum alone {alone:.2f}, in a row {best:.2f}: {choice}",
            flush=True,
        )
        return tiles


class Tuner:
    """Compiles and times; knows what is ready, and when to stop."""

    def __init__(self, shapes: list[Shape], rows: list[int], seconds: float) -> None:
        self.start = time.monotonic()
        self.seconds = seconds
        self.rows = rows
        self.wanted = {(s, m): self._candidates(s, m) for s in shapes for m in rows}
        cases = {
            Case(shape, padded_rows(m, tile), tile): None
            for (shape, m), tiles in self.wanted.items()
            for tile in tiles
        }
        self.ready = compile_all(list(cases), seconds * 0.5)
        print(f"compiled after {time.monotonic() - self.start:.0f} s", flush=True)
        arrival_counters(torch.empty(0, device=DEVICE).device)
        self.results: dict[tuple[Shape, int], Result] = {}
        self.pinned: dict[tuple[Shape, int], Tile | None] = {}

    def tune(self, shapes: list[Shape], log: IO[str] | None) -> None:
        """Time the shapes of one layer, alone and then in a row."""
        benches = [Bench(shape) for shape in shapes]
        for bench, m in itertools.product(benches, self.rows):
            if time.monotonic() - self.start > self.seconds:
                print(f"out of time before {bench.shape.name} M={m}", flush=True)
                return
            result = time_rows(bench, m, self._tiles(bench.shape, m))
            self.results[bench.shape, m] = result
            print(result.line(), flush=True)
            if log:
                record = result._asdict() | {"shape": bench.shape._asdict()}
                log.write(json.dumps(record) + "\n")
                log.flush()
        layer = Layer(benches)
        for m in sorted(self.rows):
            tiles = layer.choose(m, [self.results[shape, m] for shape in shapes])
            self.pinned.update({(s, m): t for s, t in zip(shapes, tiles, strict=True)})

    def _candidates(self, shape: Shape, rows: int) -> list[Tile]:
        padded = 1 << (rows - 1).bit_length()
        tiles = [*vector_tiles(shape, padded)] if padded <= 4 else []
        return tiles + ([*dot_tiles(shape, padded)] if padded >= 2 else [])

    def _tiles(self, shape: Shape, rows: int) -> list[Tile]:
        tiles = [
            t
            for t in self.wanted[shape, rows]
            if Case(shape, padded_rows(rows, t), t) in self.ready
        ]
        if rows not in FOLLOWERS:
            return tiles
        padded = 1 << (rows - 1).bit_length()  # what was fast for its neighbours is enough
        fast = [self.results[shape, m] for m in self.rows if (shape, m) in self.results]
        kept = {t for r in fast if padded // 2 <= r.rows <= 64 for _, t in r.tiles[:8]}
        return [t for t in tiles if t in kept or not t.dot]


def time_rows(bench: Bench, rows: int, tiles: list[Tile]) -> Result:
    """All candidates at one number of rows."""
    x = bench.x[:rows]
    baseline = bench.microseconds(lambda w: cublas(bench.shape, x, w))
    timed = [(us, t) for t in tiles if (us := bench.time_tile(rows, t)) is not None]
    return Result(bench.shape, rows, baseline, sorted(timed))


# --- the table ---------------------------------------------------------------------------------


def table_text(pinned: dict[tuple[Shape, int], Tile | None]) -> str:
    """The tables' file with these choices in the place of what it says of their shapes."""
    text = TABLE.read_text()
    head = text[: text.index("PLAIN")]
    namespace: dict[str, Any] = {}
    exec(compile(text, str(TABLE), "exec"), namespace)
    for name in ("PLAIN", "GATED"):
        table = namespace[name]
        mine = {k: t for k, t in pinned.items() if (k[0].kind == "gated") == (name == "GATED")}
        for shape in dict.fromkeys(shape for shape, _ in mine):
            rows = {m: t and tuple(t) for (s, m), t in sorted(mine.items()) if s == shape}
            table[shape.N, shape.K] = shortened(rows)
        lines = [f"    {size}: {{\n{_entries(rows)}    }},\n" for size, rows in table.items()]
        head += f"{name}: Table = {{\n{''.join(lines)}}}\n\n"
    return head.rstrip() + "\n"


def shortened(rows: dict[int, Any]) -> dict[int, Any]:
    """The same choices without entries that say what the next one says, or nothing at the end."""
    kept = {m: t for m, t in rows.items() if any(rows[n] for n in rows if n >= m)}
    sizes = list(kept)
    return {
        m: kept[m]
        for m, n in zip(sizes, [*sizes[1:], None], strict=True)
        if n is None or kept[m] != kept[n]
    }


def _entries(rows: dict[int, Any]) -> str:
    return "".join(f"        {m}: {tile},\n" for m, tile in rows.items())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--shape", action="append", default=[], help="NxK or NxK:gated, own shapes")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=600.0, help="stop trying after this")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    parser.add_argument("--table", type=Path, default=TABLE, help="where to write the tables")
    args = parser.parse_args()
    layers = [[s for s in layer if args.only in s.name] for layer in LAYERS]
    if args.shape:
        layers = [[_own_shape(text) for text in args.shape]]
    # Those that stand for others first: the rest tries what was fast there.
    rows = sorted(map(int, args.rows.split(",")), key=lambda m: (m in FOLLOWERS, m))
    tuner = Tuner([s for layer in layers for s in layer], rows, args.seconds)
    with args.json.open("w") if args.json else contextlib.nullcontext() as log:
        for layer in filter(None, layers):
            tuner.tune(layer, log)
    args.table.write_text(table_text(tuner.pinned))
    print(f"done after {time.monotonic() - tuner.start:.0f} s: {args.table}")


def _own_shape(text: str) -> Shape:
    size, _, kind = text.partition(":")
    N, K = map(int, size.split("x"))
    return Shape(f"own {text}", N, K, kind or "plain")


if __name__ == "__main__":
    main()
