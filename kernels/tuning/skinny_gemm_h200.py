"""Tiles of ``skinny_gemm``, measured."""

PLAIN: dict[tuple[int, int], dict[int, tuple[bool, int, int, int, int, int, int] | None]] = {}
GATED: dict[tuple[int, int], dict[int, tuple[bool, int, int, int, int, int, int] | None]] = {}
