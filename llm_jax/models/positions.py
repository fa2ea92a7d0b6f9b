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
    (Grattafiori et al. 2024, section 3.4.1; the formula is that of the released code). Local layers
    may have a base of their own, and no scaling then (Gemma 3; Kamath et al. 2025, section 2).
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
    return frequencies.astype(np.float32)


def rotary_tables(
    config: config_lib.ModelConfig, positions_BT: jax.Array, is_local: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of each position's angles, float32 [B, T, rope_width / 2]."""
    frequencies = rotary_frequencies(config, is_local)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + width / 2) of the last dimension by their angles.

    Args:
      x: [B, T, ..., C]; the first `rope_width` elements are rotated, the rest pass through.
      tables: from `rotary_tables`.

    Returns:
      `x` rotated, in its dtype; the arithmetic is float32.
    """
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[-1]) for t in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
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
