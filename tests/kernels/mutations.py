"""Seeded bugs: each is planted in a copy of the kernels, and the tests of its file must fail.

    tests/kernels/mutations.py             all of them, one line each; exit status 1 if one survives
    tests/kernels/mutations.py adaln       those of one file

A mutation is (file, the text as it stands, the bug). Text that is no longer there is an error, so
the list keeps up with the code. `make mutations` runs it; minutes, so it is not in `make test`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels/univigu_kernels"
TESTS = {
    "_flash": "joint_attention",
    "_flash_backward": "joint_attention",
    "_flash_hopper": "flash_hopper",
    "_ffn": "routed_ffn",
    "_vocab": "vocab_loss",
    "_qknorm_rope": "qknorm_rope",
    "residual_adaln": "adaln",
    "_fp8_ffn": "fp8_ffn",
    "_split": "split",
    "_rows": "adaln",
    "_adaln": "adaln",
}
MUTATIONS: list[tuple[str, str, str]] = [
    # wrong segment, missing eps, dropped tail, wrong statistics
    ("_rows", "text = tile >= video_tiles", "text = tile > video_tiles"),
    ("adaln", "weight + b * w_b + segment * w_s", "weight + b * w_b"),
    ("adaln", "segment == 1, eps_text, eps_video", "segment == 0, eps_text, eps_video"),
    ("_adaln", "/ D + eps)", "/ D)"),
    ("_adaln", "tl.where(cols < D, x - mean, 0.0)", "x - mean"),
    ("_rows", "tl.minimum(first + ROWS,", "tl.minimum(first + ROWS - 1,"),
    ("_adaln", "- n_row * (tl.sum(g_row * n_row, 0) / D)", ""),
    ("residual_adaln", "y_row *= g_row", "y_row = y_row"),
    ("residual_adaln", "d_row += load_row(dnew + at * D, cols, D)", "d_row += 0.0"),
    ("residual_adaln", "constant + b * c_b", "constant"),
    ("residual_adaln", "(x_row.to(tl.float32) + c_row)", "(x_row.to(tl.float32))"),
    # swapped cosine and sine, wrong axis, wrong rotation back
    (
        "_qknorm_rope",
        "return x0 * cos - x1 * sin, x0 * sin + x1 * cos",
        "return x0 * sin - x1 * cos, x0 * cos + x1 * sin",
    ),
    ("_qknorm_rope", "(row % width) * P_W", "(row % height) * P_W"),
    ("_qknorm_rope", "rotate(d0, d1, cos, -sin)", "rotate(d0, d1, cos, sin)"),
    ("_qknorm_rope", "/ (H * K) + eps)", "/ K + eps)"),
    # k of another sample, a wrong stride of kept rows, v of another sample
    ("_qknorm_rope", "k_out + b * k_out_b", "k_out + b * rows * (H * K)"),
    ("_qknorm_rope", "out + row * out_l + at, tl.load", "out + row * x_l + at, tl.load"),
    ("_qknorm_rope", "v_out += b * v_out_b", "v_out += 0"),
    # missing eps, missing projection, dropped row, wrong stride of a packed row
    ("rms_norm", "/ D + eps)", "/ D)"),
    ("rms_norm", " - n_row * (tl.sum(g_row * n_row, 0) / D)", ""),
    ("rms_norm", "tl.minimum(first + ROWS, rows)", "tl.minimum(first + ROWS, rows - 1)"),
    ("rms_norm", "x + b * x_b + row * x_r", "x + b * x_b + row * D"),
    # no floor of the norm, a pixel beyond the last, another sample, channels that are none
    (
        "rms_norm_silu",
        "tl.maximum(tl.sqrt(tl.sum(x_cp * x_cp, 0)), LEAST)",
        "tl.sqrt(tl.sum(x_cp * x_cp, 0))",
    ),
    ("rms_norm_silu", "(p < pixels)", "(p <= pixels)"),
    ("rms_norm_silu", "(b * C + c) * pixels", "(b + c) * pixels"),
    ("rms_norm_silu", "tl.sqrt(C * 1.0)", "tl.sqrt(BLOCK_C * 1.0)"),
    # mask off by one, another sample's length, wrong scale, keys that must not be seen
    (
        "_flash",
        "(rows < end - start) & (cols < D), other=0.0",
        "(rows <= end - start) & (cols < D), other=0.0",
    ),
    ("_flash", "tl.load(lengths + b)", "tl.load(lengths)"),
    ("_flash", "first < video_queries, video_keys, keys", "first < video_queries, keys, keys"),
    ("_flash", "total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    ("_flash", "tl.maximum(video_queries, queries - (keys - limit))", "queries - (keys - limit)"),
    # keys beyond the padding, another split's log-sum-exp, few tiles in one piece
    ("_flash", "stop = split * span, tl.minimum(seen,", "stop = split * span, tl.minimum(keys,"),
    ("_flash", "plane = split * tl.num_programs(1) + head", "plane = split + head"),
    ("_flash", "least = blocks if tiles >= WAVES", "least = blocks if tiles >= 0"),
    ("cross_attention", "_geometry(q, k), repeats)", "_geometry(q, k))"),
    ("_flash_backward", "(p * (dp - row_delta))", "(p * dp)"),
    ("_flash_backward", "dk_tile * scale", "dk_tile"),
    # a box that is not cut, rows of the other group, a piece without keys, wrong pieces, lost turns
    ("_flash_hopper", "row + BLOCK_N, seen, head)", "row + BLOCK_N, seen + 64, head)"),
    (
        "_flash_hopper",
        "box_at(b, first, end, head, D), buffer",
        "box_at(b, first, end + 8, head, D), buffer",
    ),
    ("_flash_hopper", "first += GROUP * ROWS", "first += 0"),
    ("_flash_hopper", "(rows < live) & (total > 0)", "rows < live"),
    ("_flash_hopper", "gl.where(real[:, None], acc, 0.0)", "acc"),
    ("_flash_hopper", 'gl.where(top == float("-inf"), 0.0, top)', "top"),
    ("_flash_hopper", "sums * gl.convert_layout(shrink, sum_rows)[:, None]", "sums"),
    ("_flash_hopper", "cols == seen - 1, repeats", "cols == seen, repeats"),
    ("_flash_hopper", "gl.maximum(high, low + 1)", "high"),
    ("_flash_hopper", "piece // rest * span", "piece // rest"),
    ("_flash_hopper", "start, apart = nth * TILE, rest * TILE", "start, apart = nth * TILE, TILE"),
    ("_flash_hopper", "if GROUP == 1:\n        _pass_turn", "if GROUP == 0:\n        _pass_turn"),
    (
        "_flash_hopper",
        "block // STAGES % 2 ^ 1",
        "block // STAGES % 2",
    ),
    # wrong expert, forgotten bias, wrong slope, wrong row of a batch
    ("_ffn", "tl.where(text, text_bias, video_bias), quarters", "video_bias, quarters"),
    (
        "_ffn",
        "y_tile += tl.load(bias + n, n < D, other=0.0).to(tl.float32)[None, :]",
        "y_tile += 0.0",
    ),
    ("_ffn", "0.2140644488", "0.0713548163"),
    ("_ffn", "m // rows, before + m % rows", "m // rows, before + m // rows"),
    (
        "_ffn",
        "before = tl.where(text, T, V), tl.where(text, V, 0)\n    steps",
        "before = tl.where(text, T, V), tl.where(text, 0, 0)\n    steps",
    ),
    # another row's scale, no scale, the amax of a quarter of the columns
    ("_fp8_ffn", "start // COLUMNS * rows + at", "at"),
    ("_fp8_ffn", "tl.dot(x_tile, w_tile) * scale[:, None]", "tl.dot(x_tile, w_tile)"),
    (
        "_fp8_ffn",
        "tl.maximum(amax, tl.max(tl.abs(values[part]), 1))",
        "tl.max(tl.abs(values[part]), 1)",
    ),
    # wrong counter, wrong seed, lost scale, ignored rows, lost split
    ("vocab_sample", "tl.load(seeds + b)", "tl.load(seeds)"),
    ("vocab_sample", "text_M[:, None], step, PURPOSE", "text_M[:, None], 0, PURPOSE"),
    ("_vocab", "tl.where(column_N[None, :] < N - n", "tl.where(column_N[None, :] <= N - n"),
    ("_vocab", "total_M * exp(peak_M - peak) + tile_M", "total_M + tile_M"),
    ("vocab_loss", "p_MN - 1.0, p_MN", "p_MN, p_MN"),
    ("vocab_loss", "tl.where((target_M != ignore_index)[:, None], dz_MN, 0.0)", "dz_MN"),
    # a part that runs into the next row, another part's place, a part left out, no GELU in the join
    ("_split", "tl.minimum(depth, D - first)", "depth"),
    ("_split", "(part * rows + m) * F + n", "m * F + n"),
    ("_split", "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    ("_split", "acc * _sigmoid_2u(acc) if GELU", "acc if GELU"),
    ("_split", "grid = rows, -(-F // chosen", "grid = rows, (F // chosen"),
    ("fp8_linear", "EVEN_K=D % options", "EVEN_K=0 * D % options"),
    ("flow_step", "v_null + guidance * (v - v_null)", "v + guidance * (v - v_null)"),
    ("flow_step", "tl.load(seeds + at // rows", "tl.load(seeds + at % rows"),
]


def plant(file: str, before: str, after: str, folder: Path) -> None:
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "univigu_kernels", ignore=caches)
    path = folder / f"univigu_kernels/{file}.py"
    code = path.read_text()
    if code.count(before) < 1:
        raise SystemExit(f"mutations: {file}.py must hold {before!r}; it doesn't. Update the list.")
    path.write_text(code.replace(before, after, 1))


def survives(file: str, before: str, after: str) -> bool:
    stem = TESTS.get(file, file)
    with tempfile.TemporaryDirectory() as folder:
        plant(file, before, after, Path(folder))
        own = [f"tests/kernels/test_{stem}.py", f"tests/kernels/test_{stem}_triton.py"]
        tests = [*own, "tests/kernels/test_ops.py", "tests/model/test_model.py"]
        present = [test for test in tests if (ROOT / test).exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [
            "-o",
            f"pythonpath={folder} {ROOT} {ROOT / 'tests/support'}",
            "-k",
            f"{stem} or triton",
            *present,
        ]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode not in (0, 1):
        raise SystemExit(f"mutations: {file}: pytest could not run\n{process.stdout[-2000:]}")
    return process.returncode == 0


def main() -> int:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or m[0] in sys.argv[1:]]
    escaped = 0
    for file, before, after in chosen:
        alive = survives(file, before, after)
        escaped += alive
        print(f"{'SURVIVES' if alive else 'caught'}: {file}: {before!r} -> {after!r}", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
