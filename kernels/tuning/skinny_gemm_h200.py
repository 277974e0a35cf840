"""Which tile multiplies a shape fastest at each number of rows, on an H200; see ``skinny_gemm``.

{(N, K): {most rows: tile}}, where an entry holds for the rows from the entry before it up to its
own. None, and rows beyond the last entry, mean that cuBLAS is as fast. A tile's values are, in
order: dot form, weight rows, input features of a turn, slices, K split, warps, stages, turns
called ahead (``skinny_gemm.Tile``). The shapes are those of an 8B and a 0.6B model.

Measured by ``scripts/tune_skinny_gemm.py``, torch 2.11, CUDA 13.0, Triton 3.6: bfloat16, in CUDA
graphs, on weights that are not in the L2 cache, the products of a layer following each other.
"""

Row = tuple[bool, int, int, int, int, int, int, int]
Table = dict[tuple[int, int], dict[int, Row | None]]

# x @ weight.T, N weight rows.
PLAIN: Table = {
    (6144, 4096): {
        1: (False, 4, 512, 1, 1, 2, 1, 0),
        2: (False, 2, 1024, 1, 1, 2, 1, 0),
        8: (True, 16, 256, 4, 1, 4, 6, 0),
        16: (True, 64, 128, 1, 4, 4, 3, 0),
        32: (True, 64, 128, 1, 1, 4, 6, 8),
        48: None,
        64: (True, 64, 128, 1, 1, 4, 6, 3),
    },
    (4096, 4096): {
        1: (False, 4, 2048, 1, 1, 8, 3, 0),
        2: (False, 2, 1024, 1, 1, 2, 1, 0),
        4: (True, 64, 128, 1, 4, 4, 6, 3),
        8: (True, 32, 512, 8, 1, 8, 4, 0),
        16: (True, 64, 128, 1, 2, 4, 6, 8),
        48: (True, 64, 128, 1, 2, 4, 6, 3),
    },
    (4096, 14336): {
        1: (False, 1, 2048, 1, 1, 4, 1, 0),
        2: (False, 2, 1024, 1, 1, 4, 1, 0),
        8: (True, 32, 512, 8, 1, 8, 4, 0),
        32: (True, 64, 128, 1, 2, 4, 6, 3),
        48: (True, 64, 128, 1, 2, 4, 4, 3),
        64: (True, 64, 128, 1, 2, 4, 4, 0),
    },
    (4096, 1024): {
        1: (False, 4, 512, 1, 1, 8, 3, 0),
        2: (False, 4, 1024, 1, 1, 4, 1, 0),
        4: (True, 64, 128, 1, 1, 4, 6, 3),
        16: None,
        24: (True, 64, 128, 1, 1, 4, 6, 3),
        32: (True, 64, 128, 1, 1, 4, 6, 0),
    },
    (1024, 2048): {
        1: (False, 2, 2048, 1, 1, 8, 1, 0),
        2: (False, 4, 2048, 1, 1, 8, 1, 0),
        4: (False, 2, 512, 1, 1, 2, 1, 0),
        16: (True, 16, 256, 4, 1, 4, 6, 3),
        32: (True, 16, 512, 4, 1, 4, 4, 3),
        64: (True, 32, 128, 1, 8, 4, 3, 0),
    },
    (1024, 3072): {
        1: (False, 2, 2048, 1, 1, 4, 1, 1),
        2: (False, 2, 2048, 1, 1, 4, 3, 0),
        8: (True, 16, 512, 4, 1, 4, 6, 3),
        16: (True, 16, 256, 4, 1, 4, 6, 3),
        24: (True, 64, 128, 1, 8, 4, 4, 3),
        32: (True, 64, 128, 1, 8, 4, 4, 0),
        64: (True, 64, 128, 1, 8, 4, 4, 3),
    },
    (128256, 4096): {
        1: (False, 4, 1024, 1, 1, 8, 1, 0),
        4: (True, 16, 256, 4, 1, 4, 3, 0),
        8: (True, 64, 128, 1, 1, 4, 4, 0),
        32: (True, 64, 128, 1, 1, 4, 3, 0),
        48: (True, 64, 64, 1, 1, 4, 3, 0),
        64: (True, 128, 64, 1, 1, 4, 4, 0),
        128: (True, 128, 64, 1, 1, 4, 3, 0),
    },
    (151936, 1024): {
        1: (False, 4, 512, 1, 1, 2, 1, 0),
        4: (True, 64, 128, 1, 1, 4, 3, 0),
        8: (True, 64, 128, 1, 1, 4, 6, 0),
        32: (True, 64, 128, 1, 1, 4, 3, 0),
        48: (True, 64, 128, 1, 1, 4, 3, 3),
        64: (True, 64, 64, 1, 1, 4, 6, 3),
        128: (True, 64, 64, 1, 1, 4, 4, 0),
    },
}

# act(gate) * up, N = gate and up rows together.
GATED: Table = {
    (28672, 4096): {
        1: (False, 4, 1024, 1, 1, 8, 1, 0),
        2: (True, 16, 512, 4, 1, 4, 3, 0),
        4: (True, 16, 512, 4, 1, 4, 4, 0),
        8: (True, 16, 512, 4, 1, 4, 3, 0),
        24: (True, 64, 128, 1, 1, 4, 4, 0),
        32: (True, 128, 128, 1, 1, 8, 4, 0),
        48: (True, 128, 64, 1, 1, 4, 4, 3),
        128: (True, 128, 64, 1, 1, 4, 3, 0),
    },
    (6144, 1024): {
        1: (False, 4, 512, 1, 1, 4, 1, 0),
        2: (False, 4, 512, 1, 1, 2, 1, 0),
        4: (True, 16, 512, 4, 1, 4, 3, 0),
        16: (True, 64, 128, 1, 1, 4, 6, 0),
        32: (True, 64, 128, 1, 1, 4, 6, 3),
        64: (True, 64, 128, 1, 1, 4, 4, 3),
    },
}
