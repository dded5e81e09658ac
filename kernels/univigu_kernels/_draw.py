"""A draw on a GPU: word 0 of the generator of _philox.py, and the time that it stands for.

Legend   M text rows, P columns of a piece.
"""

from ._triton import tl, triton

MIDDLE = 8  # rounds of the generator that are one loop


@triton.jit
def _mix(c0, c1, c2, c3, k0, k1):
    """A round of Philox-4x32 and the next round's key."""
    return (
        tl.umulhi(0xCD9E8D57, c2) ^ c1 ^ k0,
        c2 * 0xCD9E8D57,
        tl.umulhi(0xD2511F53, c0) ^ c3 ^ k1,
        c0 * 0xD2511F53,
        k0 + 0x9E3779B9,
        k1 + 0xBB67AE85,
    )


@triton.jit
def draw_word(seed, n_1P, t_M1, step, PURPOSE: tl.constexpr, middle):
    """Word 0 of Philox-4x32-10 at (n, t, step, PURPOSE): a round of words that are a row or a
    column, `middle` = MIDDLE rounds, and of the last one what word 0 takes. The compiler does not
    know `middle`, an argument of the kernel, and unrolls nothing: with ten rounds for each piece of
    a tile it took three times as long. Two rounds before the loop cost registers: it spills."""
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = n_1P.to(tl.uint32, bitcast=True), t_M1.to(tl.uint32, bitcast=True)
    c2, c3 = step.to(tl.uint32, bitcast=True), tl.full([1, 1], PURPOSE, tl.uint32)
    c0, c1, c2, c3, k0, k1 = _mix(c0, c1, c2, c3, k0, k1)
    whole_MP = tl.zeros_like(n_1P + t_M1).to(tl.uint32)
    c0, c1, c2, c3 = c0 | whole_MP, c1 | whole_MP, c2 | whole_MP, c3 | whole_MP
    for _ in range(middle):
        c0, c1, c2, c3, k0, k1 = _mix(c0, c1, c2, c3, k0, k1)
    return tl.umulhi(0xCD9E8D57, c2) ^ c1 ^ k0


@triton.jit
def waiting_time(word):
    """-log(u), u = ((word >> 8) + 0.5) * 2^-24, to 3e-7 of itself. fp32 rounds u above 1/2; what it
    loses there is exact and goes into the logarithm. (tl.log branches, and could not take it.)"""
    grid = (word >> 8).to(tl.int32).to(tl.float32) * 2.0**-24
    u = grid + 2.0**-25
    lost = (grid - u) + 2.0**-25
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # u = 2^e f, f in [2/3, 4/3)
    r = (bits - exponent).to(tl.float32, bitcast=True) - 1.0 + lost
    # log(1 + r) = r + r^2 q(r): q is minimax on |r| <= 1/3, off by 1.9e-7 of log(1 + r).
    q = -0.15266815 * r + 0.16990559
    q = q * r - 0.1644081
    q = q * r + 0.19818169
    q = q * r - 0.25006324
    q = q * r + 0.33336735
    q = q * r - 0.4999996
    return exponent.to(tl.float32) * (-0.6931471805599453 * 2.0**-23) - (r + r * r * q)
