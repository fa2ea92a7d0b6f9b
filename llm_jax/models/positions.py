"""How a model knows where a token stands: rotary tables, sinusoids and ALiBi slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib


def rotary_frequencies(config: config_lib.ModelConfig, is_local: bool = False) -> np.ndarray:
    """Returns the angle per position of each rotated pair, float32 [rope_width / 2].

    RoPE is of Su et al. 2021 (equation 15). `linear` scaling divides every frequency (Chen et al.
    2023); `llama3` divides the long wavelengths, keeps the short ones and interpolates between
    (Grattafiori et al. 2024, section 3.4.1; the formula is that of the released code), and so does
    `yarn`, by place among the pairs (Peng et al. 2023, section 3.2). Local layers may have a base of
    their own, and no scaling then (Gemma 3; Kamath et al. 2025, section 2).
    """
    width = config_lib.rope_width(config)
    pairs = -np.arange(0, width, 2, dtype=np.float64) / width
    if is_local and config.rope_local_theta is not None:
        return (config.rope_local_theta**pairs).astype(np.float32)
    frequencies = config.rope_theta**pairs
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_scaling_factor
    elif config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_length * frequencies / (2 * math.pi)
        share_kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (share_kept + (1 - share_kept) / config.rope_scaling_factor)
    elif config.rope_scaling == "yarn":
        share_kept = _yarn_shares_kept(config)
        frequencies = frequencies * (share_kept + (1 - share_kept) / config.rope_scaling_factor)
    return frequencies.astype(np.float32)


def _yarn_shares_kept(config: config_lib.ModelConfig) -> np.ndarray:
    """Returns how much of each pair's frequency is kept, [rope_width / 2], falling from 1 to 0.

    The ramp goes by the pair's place, between those that turn `rope_beta_fast` and `rope_beta_slow`
    times in the original length, rounded outwards as in the authors' code.
    """
    width = config_lib.rope_width(config)

    def place(turns: float) -> float:
        wavelength = config.rope_original_length / turns
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(place(config.rope_beta_fast)), 0)
    last = min(math.ceil(place(config.rope_beta_slow)), width - 1)
    # Where both are the same pair, the authors' code has a step of this width.
    ramp = (np.arange(width // 2) - first) / (last - first or 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotary_factor(config: config_lib.ModelConfig, is_local: bool = False) -> float:
    """Returns what rotated elements are multiplied with: 1, but for YaRN (Peng et al. 2023, section 3.4)."""
    if config.rope_scaling != "yarn" or (is_local and config.rope_local_theta is not None):
        return 1.0
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return 0.1 * math.log(config.rope_scaling_factor) + 1.0


def rotary_tables(
    config: config_lib.ModelConfig, positions_BT: jax.Array, is_local: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of each position's angles, float32 [B, T, rope_width / 2].

    Both are multiplied with `rotary_factor`.
    """
    frequencies = rotary_frequencies(config, is_local)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    factor = rotary_factor(config, is_local)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(
    x: jax.Array, tables: tuple[jax.Array, jax.Array], is_interleaved: bool = False
) -> jax.Array:
    """Rotates pairs (i, i + width / 2) of the last dimension by their angles.

    Args:
      x: [B, T, ..., C]; the first `rope_width` elements are rotated, the rest pass through.
      tables: from `rotary_tables`.
      is_interleaved: whether the pairs of `x` are (2 i, 2 i + 1). They become the others: scores are
        those of any order that queries and keys have in common.

    Returns:
      `x` rotated, in its dtype; the arithmetic is float32.
    """
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[-1]) for t in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if is_interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Returns the sines and then the cosines of each position, float32 [B, T, width].

    The wavelengths are those of Vaswani et al. 2017, section 3.5; sines and cosines stand apart as in
    the authors' code, not in turns as in the paper.
    """
    frequencies = 10_000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)[..., : width // 2]], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns the slope of each head, float32 [H] (Press et al. 2022, section 3).

    For a number of heads that is not a power of two, the series of the next lower power is filled
    up with every second slope of the next higher one, as in the authors' code.
    """

    def series(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = series(lower) + series(2 * lower)[0::2][: num_heads - lower]
    return np.asarray(slopes, np.float32)
