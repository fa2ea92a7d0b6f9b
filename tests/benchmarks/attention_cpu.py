"""Attention implementations on a CPU, forward and backward, in one interleaved run.

    python tests/benchmarks/attention_cpu.py --rounds=7

Prints milliseconds of processor time a call, the median over the rounds. What `auto` takes on a CPU
(`kernels/flash_attention/op.py`) was chosen by this.
"""

import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from llm_jax import backend
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each implementation is measured.")

# Batch, length, heads, width: of char.py, of GPT-2 124M, and longer.
_SHAPES = ((12, 64, 4, 32), (1, 1024, 12, 64), (1, 2048, 16, 64))
_IMPLEMENTATIONS = ("reference", "chunked", "jax_nn")
_CHUNK = 512


def _gradient(implementation: str):
    def loss(q_BTKGC, k_BSKC, v_BSKC):
        y_BTKGC = op.attention(
            q_BTKGC,
            k_BSKC,
            v_BSKC,
            mask=masks.causal(),
            scale=q_BTKGC.shape[-1] ** -0.5,
            implementation=implementation,
            chunk=_CHUNK,
        )
        return jnp.sum(y_BTKGC.astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def _milliseconds(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    B, T, H, C = shape
    q_BTKGC = jax.random.normal(jax.random.key(0), (B, T, H, 1, C), dtype)
    arrays = q_BTKGC, q_BTKGC[:, :, :, 0], q_BTKGC[:, :, :, 0] + 1
    gradients = {name: _gradient(name) for name in _IMPLEMENTATIONS}
    for gradient in gradients.values():
        jax.block_until_ready(gradient(*arrays))
    calls = max(3, 2**24 // (B * H * T * T))
    spent = {name: [] for name in gradients}
    for _ in range(_ROUNDS.value):
        for name, gradient in gradients.items():
            begin = time.process_time()
            for _ in range(calls):
                result = gradient(*arrays)
            jax.block_until_ready(result)
            spent[name].append((time.process_time() - begin) / calls * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def main(argv):
    del argv
    print("B, T, H, C           dtype      " + "".join(f"{x:>12}" for x in _IMPLEMENTATIONS))
    for shape in _SHAPES:
        for dtype in ("float32", "bfloat16"):
            times = _milliseconds(shape, dtype)
            cells = "".join(f"{times[name]:12.3f}" for name in _IMPLEMENTATIONS)
            print(f"{shape!s:20} {dtype:10} {cells}", flush=True)


if __name__ == "__main__":
    backend.set_flags()
    backend.keep_freed_memory()
    app.run(main)
