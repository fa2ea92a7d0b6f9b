"""The largest error of attention kernels against float64, interpreted on this machine."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.flash_attention import masks

Arrays = Mapping[str, jax.Array]
# Of the kernels' own sizes many blocks, and still quick to interpret.
LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest absolute error over the largest value, of the result and of the worst gradient."""

    result: float
    gradient: float


def of_ours(shape: shapes.Attention, device_kind: str) -> Errors:
    """Returns the errors of `flash_attention.pallas` with the block sizes of a device."""
    blocks = programs.blocks_of(device_kind, shape.width, 4096)
    return errors(shape, programs.attend(shape, "cpu", blocks, layout="BHTC"))


def of_peer(setting: peers.Setting, shape: shapes.Attention) -> Errors:
    """Returns the errors of somebody else's kernel."""
    with pltpu.force_tpu_interpret_mode():
        return errors(shape, peers.attend(setting, shape, layout="BHTC"))


def errors(shape: shapes.Attention, attend: Callable[[Arrays], jax.Array]) -> Errors:
    arrays, dy = _numbers(shape)

    def both(function, arrays, dy):
        y, pull = jax.vjp(function, arrays)
        return y, pull(dy)[0]

    actual, gradients = jax.device_get(
        jax.jit(lambda *x: both(attend, *x))(
            {name: jnp.asarray(x) for name, x in arrays.items()}, jnp.asarray(dy)
        )
    )
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        wanted, slopes = jax.device_get(
            jax.jit(lambda *x: both(lambda a: _exact(shape, a), *x))(
                wide, jnp.asarray(dy, jnp.float64)
            )
        )
    worst = max(_error(gradients[name], slopes[name]) for name in ("q", "k", "v"))
    return Errors(_error(actual, wanted), worst)


def _error(actual, wanted) -> float:
    return float(np.abs(np.asarray(actual, np.float64) - wanted).max() / np.abs(wanted).max())


def _numbers(shape: shapes.Attention) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns unit normals, rounded to the dtype of the shape; slopes as ALiBi has them."""
    rng = np.random.default_rng(0)
    K = shape.key_heads or shape.heads
    Cv, size = shape.value_width or shape.width, (shape.batch, shape.heads, shape.length)

    def normal(*dims):
        return np.asarray(jnp.asarray(rng.standard_normal(dims), shape.dtype))

    arrays = {
        "q": normal(*size, shape.width),
        "k": normal(shape.batch, K, shape.length, shape.width),
        "v": normal(shape.batch, K, shape.length, Cv),
    }
    for name, (dims, dtype) in shape.bias_arrays().items():
        arrays[name] = np.asarray(jnp.asarray(rng.standard_normal(dims), dtype))
    if "alibi" in arrays:
        arrays["alibi"] = np.float32(2.0 ** -np.arange(1, shape.heads + 1)).reshape(K, -1)
    if shape.has_sinks:
        arrays["sinks"] = rng.standard_normal((K, shape.heads // K)).astype(np.float32)
    return arrays, normal(*size, Cv)


def _exact(shape: shapes.Attention, arrays: Arrays) -> jax.Array:
    """Attention in the dtype of its arrays, as it is written down."""
    B, H, T, C = arrays["q"].shape
    K = arrays["k"].shape[1]
    q_BKGTC = arrays["q"].reshape(B, K, H // K, T, C)
    scores = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, arrays["k"]) * C**-0.5
    if shape.softcap is not None:
        scores = shape.softcap * jnp.tanh(scores / shape.softcap)
    place = jnp.arange(T)
    bias = shape.make_bias(arrays)
    if bias is not None:
        scores = scores + bias.scores_BKGTS(place, place)
    allowed = masks.allowed_BTS(shape.make_mask(), place, place)[:, None, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    if "sinks" in arrays:
        sinks = jnp.broadcast_to(arrays["sinks"][None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :T]
    return jnp.einsum("BKGTS,BKSC->BKGTC", weights, arrays["v"]).reshape(B, H, T, -1)
