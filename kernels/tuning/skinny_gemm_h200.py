"""Which tile multiplies a shape fastest at each number of rows, on an H200; see ``skinny_gemm``.

{(N, K): {most rows: tile}}, where an entry holds for the rows from the entry before it up to its
own. None, and rows beyond the last entry, mean that cuBLAS is as fast. ``GATED`` is for products
whose gate and up features are joined, N counting both. A tile's values are those of ``Tile``: dot
form, weight rows, input features of a turn, slices, parts of K, warps, stages, turns called ahead.

Measured by ``scripts/tune_skinny_gemm.py``, torch 2.11, CUDA 13.0, Triton 3.6: bfloat16, in CUDA
graphs, on weights that are not in the L2 cache, the products of a layer following each other.
Microseconds of a layer (and of the head), cuBLAS with the activation's kernel -> these tiles:

| rows | 8B | head | 0.6B | head |
| --- | --- | --- | --- | --- |
| 1 | 118.2 -> 102.3 | 251 -> 232 | 30.8 -> 11.1 | 82 -> 71 |
| 2 | 118.4 -> 109.3 | 252 -> 237 | 31.0 -> 13.2 | 82 -> 73 |
| 8 | 119.7 -> 111.2 | 255 -> 240 | 24.2 -> 16.7 | 87 -> 76 |
| 16 | 121.2 -> 111.9 | 261 -> 243 | 24.6 -> 18.1 | 93 -> 77 |
| 32 | 124.7 -> 114.9 | 282 -> 249 | 25.2 -> 19.5 | 102 -> 80 |
| 64 | 128.7 -> 121.3 | 313 -> 265 | 26.0 -> 22.9 | 119 -> 87 |
| 128 | 140.4 -> 136.9 | 335 -> 311 | 27.5 (cuBLAS) | 150 -> 114 |

From 4 to 16 rows the 0.6B's q, k and v keep the tile that is fastest alone (3.6, cuBLAS 4.9), not
the one that was fastest right behind another product: in a model a norm stands between them.
"""

Row = tuple[bool, int, int, int, int, int, int, int]
Table = dict[tuple[int, int], dict[int, Row | None]]

PLAIN: Table = {
    (6144, 4096): {  # 8B: q, k and v
        1: (False, 4, 512, 1, 1, 2, 1, 0),
        2: (False, 4, 1024, 1, 1, 4, 1, 0),
        4: (True, 16, 256, 4, 1, 4, 6, 3),
        8: (True, 16, 512, 4, 1, 4, 4, 0),
        64: (True, 64, 128, 1, 1, 4, 6, 3),
    },
    (4096, 4096): {  # 8B: attention's output
        1: (False, 4, 1024, 1, 1, 2, 3, 0),
        2: (False, 4, 1024, 1, 1, 4, 1, 0),
        32: (True, 64, 128, 1, 2, 4, 6, 3),
        64: (True, 64, 128, 1, 2, 4, 4, 3),
    },
    (4096, 14336): {  # 8B: down
        1: (False, 1, 2048, 1, 1, 4, 1, 0),
        2: (False, 2, 512, 1, 1, 2, 1, 0),
        64: (True, 64, 128, 1, 2, 4, 6, 3),
    },
    (4096, 1024): {  # 0.6B: q, k and v
        1: (False, 4, 512, 1, 1, 8, 3, 0),
        2: (False, 4, 512, 1, 1, 2, 1, 0),
        16: (True, 64, 128, 1, 1, 4, 6, 3),
        64: (True, 64, 128, 1, 1, 4, 4, 3),
    },
    (1024, 2048): {  # 0.6B: attention's output
        1: (False, 2, 2048, 1, 1, 8, 1, 0),
        2: (False, 2, 2048, 1, 1, 4, 1, 0),
        4: (False, 1, 2048, 1, 1, 4, 1, 0),
        8: (True, 16, 512, 4, 1, 4, 6, 3),
        16: (True, 64, 128, 1, 4, 4, 6, 3),
        32: (True, 64, 128, 1, 4, 4, 6, 0),
        64: (True, 64, 128, 1, 4, 4, 4, 3),
    },
    (1024, 3072): {  # 0.6B: down
        1: (False, 2, 2048, 1, 1, 4, 1, 1),
        2: (False, 2, 2048, 1, 1, 8, 1, 0),
        8: (True, 16, 512, 4, 1, 4, 6, 3),
        32: (True, 64, 128, 1, 4, 4, 6, 3),
        64: (True, 64, 128, 1, 4, 4, 4, 3),
    },
    (128256, 4096): {  # 8B: head
        1: (False, 4, 1024, 1, 1, 8, 1, 0),
        8: (True, 64, 128, 1, 1, 4, 3, 0),
        16: (True, 128, 128, 1, 1, 8, 3, 0),
        32: (True, 64, 128, 1, 1, 4, 3, 0),
        64: (True, 64, 64, 1, 1, 4, 3, 0),
        128: (True, 128, 64, 1, 1, 4, 3, 0),
    },
    (151936, 1024): {  # 0.6B: head
        1: (False, 4, 512, 1, 1, 2, 3, 0),
        32: (True, 64, 128, 1, 1, 4, 3, 0),
        64: (True, 64, 64, 1, 1, 4, 6, 3),
        128: (True, 64, 64, 1, 1, 4, 4, 0),
    },
}

GATED: Table = {
    (28672, 4096): {  # 8B: gate and up
        1: (False, 2, 1024, 1, 1, 4, 1, 0),
        2: (False, 4, 512, 1, 1, 2, 3, 0),
        4: (True, 64, 128, 1, 1, 4, 4, 3),
        16: (True, 128, 128, 1, 1, 8, 4, 3),
        32: (True, 64, 128, 1, 1, 4, 4, 3),
        64: (True, 128, 128, 1, 1, 8, 4, 0),
        128: (True, 128, 64, 1, 1, 4, 3, 3),
    },
    (6144, 1024): {  # 0.6B: gate and up
        1: (False, 4, 512, 1, 1, 4, 3, 0),
        4: (True, 64, 128, 1, 1, 4, 6, 3),
        8: (True, 64, 128, 1, 1, 4, 4, 3),
        32: (True, 64, 128, 1, 1, 4, 6, 3),
        64: (True, 64, 128, 1, 1, 4, 4, 3),
    },
}
