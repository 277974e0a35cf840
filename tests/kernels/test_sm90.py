"""Every kernel compiles for an H100 or H200, and fits its shared memory. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "_bitmask_kernel",
    "_chunk_logprobs_kernel",
    "_collect_kernel",
    "_decode_kernel",
    "_dot_kernel",
    "_draw_kernel",
    "_fused_add_rms_norm_kernel",
    "_gated_kernel",
    "_gather_kernel",
    "_has_nan_kernel",
    "_merge_kernel",
    "_noise_kernel",
    "_penalties_kernel",
    "_pick_kernel",
    "_plan_kernel",
    "_prefill_kernel",
    "_prepare_kernel",
    "_qkv_kernel",
    "_rank_kernel",
    "_rms_norm_kernel",
    "_row_logprobs_kernel",
    "_scan_kernel",
    "_settle_kernel",
    "_store_kernel",
    "_store_samples_kernel",
    "_token_bias_kernel",
    "_vector_kernel",
}
SHARED_MEMORY_BYTES = 227 * 1024


def test_every_kernel_compiles_for_sm90_within_its_shared_memory() -> None:
    root = Path(__file__).parents[2]
    program = root / "tests" / "kernels" / "sm90_compile.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    result = subprocess.run(
        [sys.executable, str(program)],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == KERNELS
    assert all(report["cubin_bytes"] > 0 for report in reports)
    assert [r for r in reports if r["shared"] > SHARED_MEMORY_BYTES] == []
    # 16-bit attention of whole tiles must reach the tensor cores of this generation.
    assert any(r["wgmma"] for r in reports if r["kernel"] == "_prefill_kernel")
    assert any(r["wgmma"] for r in reports if r["kernel"] == "_dot_kernel")
    # An approximate logarithm near 1 is wrong by more than the noise that is made with it.
    assert not any(r["approximate_log"] for r in reports)
