"""Dense masked softmax attention in NumPy, float64: what the operators must equal."""

import numpy as np


def relative_error(got, want):
    """Root mean square of the difference over that of `want`."""
    difference = np.asarray(got, np.float64) - want
    return np.sqrt((difference**2).mean() / (want**2).mean())


def masked_attention(q, k, v, mask, do=None):
    """Attention where `mask`, bool [B, H, T, S], is set; a row that sees nothing gives 0.

    With `do` also its pull-back: (o, (dq, dk, dv)). Heads of q, k and v agree.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    s = np.where(mask, scale * np.einsum("bthd,bshd->bhts", q, k, optimize=True), -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0.0, top))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    o = np.einsum("bhts,bshe->bthe", p, v, optimize=True)
    if do is None:
        return o
    do = np.asarray(do, np.float64)
    dp = np.einsum("bthe,bshe->bhts", do, v, optimize=True)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    dq = np.einsum("bhts,bshd->bthd", ds, k, optimize=True)
    dk = np.einsum("bhts,bthd->bshd", ds, q, optimize=True)
    return o, (dq, dk, np.einsum("bhts,bthe->bshe", p, do, optimize=True))
