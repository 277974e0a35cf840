"""From logits to token ids: temperature, min-p, top-k, top-p, then one draw by Gumbel-max.

The noise of a draw is a pure function of (request seed, token position, token id), so a result
depends neither on batch mates nor on the order of steps, and a restarted request draws the same.

What the filters keep, in their order, for x = logits / temperature:
  min_p  tokens with exp(x - max x) >= min_p;
  top_k  of those, the tokens not below the k-th largest;
  top_p  of those, renormalised, each token whose strictly likelier ones sum to less than top_p.
So each filter is a threshold: tokens of exactly equal logits stay or go together, and the
likeliest token always stays. The draw is argmax(x + g) with g = -log(-log u), u uniform; a
temperature below 1e-5 is plain argmax. Of equal candidates the lowest id wins.
Shapes: B rows, V vocabulary.

Sources: Gumbel-max, Gumbel (1954); min-p, Nguyen et al., arXiv:2407.01082; the multipliers of
the hash's mixing step are Wellons', https://nullprogram.com/blog/2018/07/31/.
"""

import math

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this is argmax
_MASK = 0xFFFFFFFF


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_random: bool = True,
    any_filter: bool = True,
) -> Tensor:
    """Return one token id per row, [B] int64; the logits are left as they are.

    Args:
        logits: [B, V] float32, contiguous, without NaN. -inf is never drawn, unless a whole row
            is: it returns 0.
        temperature: [B] float32.
        top_k: [B] int32, 0 is off.
        top_p, min_p: [B] float32, 1 and 0 are off.
        seeds: [B] int64, any bits.
        positions: [B] int64, the position of the token that is drawn.
        any_random: False promises that every row is greedy. Known to the host, so nothing waits
            for the device.
        any_filter: False promises that no random row has a filter on.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [B, V] float32, not {logits.shape}, {logits.dtype}")
    _check_rows(logits.shape[0], logits, temperature, top_k, top_p, min_p, seeds, positions)
    if not any_random:
        return logits.argmax(dim=1)
    return sample_reference(logits, temperature, top_k, top_p, min_p, seeds, positions)


def _check_rows(B: int, logits: Tensor, *per_row: Tensor) -> None:
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    for tensor, dtype in zip(per_row, (f32, i32, f32, f32, i64, i64), strict=True):
        if tensor.shape != (B,) or tensor.dtype != dtype:
            raise ValueError(f"a parameter must be [{B}] {dtype}: {tensor.shape}, {tensor.dtype}")
    if not all(t.is_contiguous() and t.device == logits.device for t in (logits, *per_row)):
        raise ValueError("all tensors must be contiguous and on one device")


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return the noise of each draw, [B, vocab_size] float32, for [B] int64 seeds and positions.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if seeds.ndim != 1 or seeds.shape != positions.shape or vocab_size < 1:
        raise ValueError(f"seeds and positions must be [B]: {seeds.shape}, {positions.shape}")
    if seeds.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"seeds and positions must be int64: {seeds.dtype}, {positions.dtype}")
    if seeds.device != positions.device:
        raise ValueError("seeds and positions must be on one device")
    return gumbel_noise_reference(seeds, positions, vocab_size)


def _mix_reference(x: Tensor) -> Tensor:
    """Scatter 32 bits held in an int64; each input bit reaches each output bit."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_bits_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The definition of the random bits, [B, vocab_size], uint32 values held in int64.

    Two 32-bit keys come from (seed, position); the token id is mixed with one, then the other.
    """
    low, high, position = seeds & _MASK, (seeds >> 32) & _MASK, positions & _MASK
    key_a, key_b = position ^ 0x3C6EF372, low ^ 0xA54FF53A
    for a, b in ((low, high), (high, position)):
        key_a, key_b = _mix_reference(key_a ^ a), _mix_reference((key_b + b) & _MASK)
    token_ids = torch.arange(vocab_size, device=seeds.device)
    x = (token_ids * 0x9E3779B9 + key_a.unsqueeze(1)) & _MASK
    return _mix_reference(_mix_reference(x) ^ key_b.unsqueeze(1))


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The definition: u from the upper 24 bits, the last of them set so that 0 < u < 1."""
    bits = noise_bits_reference(seeds, positions, vocab_size)
    u = ((bits >> 8) | 1).float() * 2.0**-24
    return -torch.log(-torch.log(u))


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """The definition: one row after the other, with a full sort."""
    V = logits.shape[1]
    noise = gumbel_noise_reference(seeds, positions, V)
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for b in range(logits.shape[0]):
        if float(temperature[b]) < GREEDY_BELOW:
            token_ids[b] = logits[b].argmax()
            continue
        x = logits[b] * (1.0 / temperature[b])
        x = x.masked_fill(x < x.max() + _log(float(min_p[b])), -torch.inf)
        k = int(top_k[b])
        if 0 < k < V:
            x = x.masked_fill(x < torch.topk(x, k).values[-1], -torch.inf)
        if float(top_p[b]) < 1.0:
            x = _top_p_reference(x, float(top_p[b]))
        token_ids[b] = (x + noise[b]).argmax()
    return token_ids


def _top_p_reference(x: Tensor, top_p: float) -> Tensor:
    weights = torch.exp((x - x.max()).double())
    values, order = torch.sort(x, descending=True)
    sums = torch.cumsum(weights[order], dim=0)
    # Mass of the strictly likelier: the running sum before the first token of equal logit.
    firsts = torch.searchsorted(-values, -values)
    likelier = torch.cat((sums.new_zeros(1), sums))[firsts]
    kept = (likelier < top_p * sums[-1]) | (values == values[0])
    return x.masked_fill(x < values[kept].min(), -torch.inf)


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf
