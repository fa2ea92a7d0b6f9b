"""The kernels under the TPU interpreter: no races, nothing read that nobody wrote, none out of bounds."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import pytest

from tests import helpers
from tests.kernels import attention_oracle
from tests.kernels import test_attention as suite


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", pytest.param("everything", marks=pytest.mark.long)])
def test_memory_is_written_before_it_is_read_and_by_one_at_a_time(name):
    case, extra = suite.named(name)
    parameters = suite.parameters_of(case)

    def gradients(implementation):
        run = suite.attend(case, extra, implementation)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(run(p) ** 2)))(parameters)

    wanted = gradients("reference")
    # A race and a read out of bounds raise; memory that nobody wrote holds NaN.
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(strict):
        y = jax.jit(suite.attend(case, extra, "pallas"))(parameters)
        actual = gradients("pallas")
    helpers.assert_close(y, attention_oracle.attention(case))
    helpers.assert_close(actual, wanted, 2e-5)
