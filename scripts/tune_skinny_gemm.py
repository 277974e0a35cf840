#!/usr/bin/env python3
"""Time every candidate tile of the skinny products on this GPU, beside cuBLAS; print what to pin.

    python scripts/tune_skinny_gemm.py                        all shapes, the table to stdout
    python scripts/tune_skinny_gemm.py --write --only 8b      into kernels/tuning, some shapes
    python scripts/tune_skinny_gemm.py --shape 6144x2048 --rows 1,8,64

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
import pprint
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
NUM_SMS = 132
DEVICE = "cuda"
SHARED_BYTES = 227 * 1024
ROTATED_BYTES = 400 << 20  # weights read between two uses of the same one
MAX_ERROR = 1e-2  # of the result's norm
MIN_GAIN = 0.98  # of cuBLAS's time: less is noise, and cuBLAS needs no table


class Shape(NamedTuple):
    """One product of a model."""

    name: str
    N: int
    K: int
    kind: str = "plain"  # or "gated", or "head": results in float32


SHAPES = (
    Shape("8b qkv", 6144, 4096),
    Shape("8b o", 4096, 4096),
    Shape("8b gate_up", 28672, 4096, "gated"),
    Shape("8b down", 4096, 14336),
    Shape("0.6b qkv", 4096, 1024),
    Shape("0.6b o", 1024, 2048),
    Shape("0.6b gate_up", 6144, 1024, "gated"),
    Shape("0.6b down", 1024, 3072),
    Shape("8b head", 128256, 4096, "head"),
    Shape("0.6b head", 151936, 1024, "head"),
)


class Case(NamedTuple):
    """One kernel variant on one shape; what a compiling process is given."""

    shape: Shape
    rows: int  # a power of two
    tile: Tile


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
SLICED = ((16, 256, 4, 4), (16, 512, 8, 8), (16, 512, 4, 4), (32, 256, 4, 4), (32, 512, 8, 8))
WHOLE = ((64, 64, 1, 4), (64, 128, 1, 4), (128, 64, 1, 4), (128, 128, 1, 8), (32, 128, 1, 4))


def dot_tiles(shape: Shape, rows: int) -> Iterator[Tile]:
    """Candidates on tensor cores, which take at least eight rows."""
    rows = max(8, rows)
    blocks = (SLICED if rows <= 32 else ()) + (WHOLE if rows >= 16 else WHOLE[:2])
    for (block_n, block_k, slices, warps), split_k, stages, prefetch in itertools.product(
        blocks, (1, 2, 4, 8), (3, 4, 6), (0, 3, 8)
    ):
        tile = Tile(True, block_n, block_k, slices, split_k, warps, stages, prefetch)
        if _dot_fits(shape, rows, tile):
            yield tile


def _dot_fits(shape: Shape, rows: int, tile: Tile) -> bool:
    programs = -(-shape.N // tile.block_n) * tile.split_k
    turns = -(-shape.K // (tile.block_k * tile.split_k))
    stages = tile.num_stages if tile.slices == 1 else tile.num_stages - 1
    shared = stages * (tile.block_n + rows) * tile.block_k * 2
    if shape.K % tile.block_k or turns < 2 or shared > SHARED_BYTES or programs < 48:
        return False
    if tile.split_k > 1 and not NUM_SMS * 0.7 <= programs <= NUM_SMS * 4:
        return False
    if tile.num_stages > turns + 1 or (tile.prefetch > turns and tile.prefetch > 3):
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
        """One launch's time on the GPU: the median of replays of a graph of many launches."""
        run(self.weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.num_launches):
                run(self.weights[i % self.num_sets])
        graph.replay()
        times: list[float] = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times) / self.num_launches * 1e3

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


def padded_rows(rows: int, tile: Tile) -> int:
    """The number of rows that a kernel is compiled for: a power of two, eight for tensor cores."""
    return max(8 if tile.dot else 1, 1 << (rows - 1).bit_length())


class Result(NamedTuple):
    """What one shape takes at one number of rows, fastest candidates first."""

    shape: Shape
    rows: int
    cublas_us: float
    tiles: list[tuple[float, Tile]]

    def best(self) -> Tile | None:
        """The tile to pin; None where cuBLAS is as good."""
        if not self.tiles or self.tiles[0][0] > self.cublas_us * MIN_GAIN:
            return None
        return self.tiles[0][1]

    def line(self) -> str:
        """One line of the printed table."""
        text = f"{self.shape.name:13s} M={self.rows:<3d} cuBLAS {self.cublas_us:6.1f}"
        if not self.tiles:
            return text
        rate = self.shape.N * self.shape.K * 2 / self.tiles[0][0] / 1e6
        fastest = " | ".join(f"{us:.2f} {_short(tile)}" for us, tile in self.tiles[:3])
        return f"{text} ours {rate:.2f} TB/s: {fastest}"


def _short(tile: Tile) -> str:
    return ("dot " if tile.dot else "vec ") + ",".join(map(str, tile[1:]))


def tune(
    shapes: Iterable[Shape], rows: list[int], seconds: float, log: IO[str] | None
) -> list[Result]:
    """Compile and time; the same kernels serve all row counts up to a power of two."""
    start = time.monotonic()
    wanted: dict[tuple[Shape, int], list[Tile]] = {}
    shapes = list(shapes)
    for shape, m in itertools.product(shapes, rows):
        padded = 1 << (m - 1).bit_length()
        tiles = [*vector_tiles(shape, padded)] if padded <= 4 else []
        wanted[shape, m] = tiles + ([*dot_tiles(shape, padded)] if padded >= 2 else [])
    cases = {
        Case(shape, padded_rows(m, tile), tile): None
        for (shape, m), tiles in wanted.items()
        for tile in tiles
    }
    ready = compile_all(list(cases), seconds * 0.5)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    arrival_counters(torch.empty(0, device=DEVICE).device)
    results: list[Result] = []
    for shape in shapes:
        bench = Bench(shape)
        for m in rows:
            padded = 1 << (m - 1).bit_length()
            tiles = [t for t in wanted[shape, m] if Case(shape, padded_rows(m, t), t) in ready]
            if m in (2, 4, 24, 48):  # what was fast for its neighbours is enough
                fast = [r for r in results if r.shape == shape and padded // 2 <= r.rows <= 64]
                kept = {t for r in fast for _, t in r.tiles[:8]}
                tiles = [t for t in tiles if t in kept or not t.dot]
            if time.monotonic() - start > seconds:
                print(f"out of time before {shape.name} M={m}", flush=True)
                return results
            results.append(time_rows(bench, m, tiles))
            print(results[-1].line(), flush=True)
            if log:
                record = results[-1]._asdict() | {"shape": shape._asdict()}
                log.write(json.dumps(record) + "\n")
                log.flush()
        del bench
    print(f"done after {time.monotonic() - start:.0f} s", flush=True)
    return results


def time_rows(bench: Bench, rows: int, tiles: list[Tile]) -> Result:
    """All candidates at one number of rows."""
    x = bench.x[:rows]
    baseline = bench.microseconds(lambda w: cublas(bench.shape, x, w))
    timed = [(us, t) for t in tiles if (us := bench.time_tile(rows, t)) is not None]
    return Result(bench.shape, rows, baseline, sorted(timed))


def table_of(results: list[Result]) -> dict[str, dict[Any, Any]]:
    """What to pin, added to what is pinned already."""
    namespace: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        exec(compile(TABLE.read_text(), str(TABLE), "exec"), namespace)
    tables = {name: dict(namespace.get(name, {})) for name in ("PLAIN", "GATED")}
    for result in results:
        table = tables["GATED" if result.shape.kind == "gated" else "PLAIN"]
        best = result.best()
        entry = table.setdefault((result.shape.N, result.shape.K), {})
        entry[result.rows] = None if best is None else tuple(best)
    return tables


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="shapes whose name holds this")
    parser.add_argument("--shape", action="append", default=[], help="NxK or NxK:gated, own shapes")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=600.0, help="stop trying after this")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    shapes = [s for s in SHAPES if not args.only or args.only in s.name]
    if args.shape:
        shapes = []
        for text in args.shape:
            size, _, kind = text.partition(":")
            N, K = map(int, size.split("x"))
            shapes.append(Shape(text, N, K, kind or "plain"))
    # Those that stand for others first: the rest tries what was fast there.
    rows = sorted(map(int, args.rows.split(",")), key=lambda m: (m in (2, 4, 24, 48), m))
    with args.json.open("w") if args.json else contextlib.nullcontext() as log:
        results = tune(shapes, rows, args.seconds, log)
    for name, table in table_of(results).items():
        print(f"{name} = {pprint.pformat(table, width=100)}")


if __name__ == "__main__":
    main()
