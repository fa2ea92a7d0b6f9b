"""One suite that every implementation of cross-entropy passes, against numpy float64."""

import logging
import math
import re

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax.kernels import placement
from llm_jax.kernels.cross_entropy import kernels
from llm_jax.kernels.cross_entropy import op
from tests import helpers
from tests.kernels import cross_entropy_oracle as oracle

B, T, D, V = 4, 6, 8, 20
IMPLEMENTATIONS = ["reference", "chunked", "pallas"]
CHUNK = 5  # does not divide the 24 tokens
BLOCKS = kernels.Blocks(tokens=16, ids=8, tile=4)  # nor do these, nor the 20 ids

# What a case changes.
CASES = {
    "plain": {},
    "z_loss": {"z_loss": 0.3},
    "softcap": {"softcap": 1.5},
    "everything": {"z_loss": 0.3, "softcap": 1.5},
    "negative_log_z": {"z_loss": 0.3, "scale": 0.01, "shift": -9.0},
}


def _case(scale=1.0, shift=0.0, seed=0, shape=(B, T, D, V), **changes):
    """Returns a case whose floats are those of float32; every third token has no weight."""
    rng = np.random.default_rng(seed)
    B, T, D, V = shape
    x, head = scale * rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    if shift:  # a feature that is the same for all moves every logit
        x[..., 0], head[:, 0] = 1.0, shift
    weights = rng.choice([0.5, 1.0, 3.0], (B, T))
    weights.flat[::3] = 0.0
    x, head = (np.float64(np.float32(array)) for array in (x, head))
    return oracle.Case(x, head, rng.integers(0, V, (B, T)), weights, **changes)


def _arrays(case, head_dims="VD", dtype="float32"):
    head = case.head_VD if head_dims == "VD" else case.head_VD.T
    return (
        jnp.asarray(case.x_BTD, dtype),
        jnp.asarray(head, jnp.float32),
        jnp.asarray(case.targets_BT, jnp.int32),
        jnp.asarray(case.weights_BT, jnp.float32),
    )


def _run(case, implementation, arrays=None, head_dims="VD", chunk=CHUNK, factor=1.0, dtype=None):
    """Returns losses and the gradients of `factor` objectives, laid out as the oracle's."""
    arrays = arrays or _arrays(case, head_dims, dtype or "float32")

    def score(x, head, targets, weights):
        return op.cross_entropy(
            x,
            head,
            targets,
            weights,
            head_dims=head_dims,
            implementation=implementation,
            chunk=chunk,
            softcap=case.softcap,
            z_loss=case.z_loss,
            blocks=BLOCKS,
        )

    def objective(x, head, targets, weights):
        losses = score(x, head, targets, weights)
        return factor * losses.objective, losses

    run = jax.jit(jax.grad(objective, (0, 1, 3), has_aux=True))
    (dx, dhead, dweights), losses = jax.device_get(run(*arrays))
    dhead = dhead if head_dims == "VD" else dhead.T
    return oracle.Result(*losses, dx, dhead, dweights)


def _assert_close(actual, wanted, tolerance=1e-5):
    """Each result by its own scale: gradients twice the tolerance of the losses."""
    for index, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        helpers.assert_close(np.float64(one), np.float64(other), tolerance * (1 + (index > 2)))


@pytest.mark.parametrize("head_dims", ["VD", "DV"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_the_oracle(name, implementation, head_dims):
    case = _case(**CASES[name])
    wanted = oracle.cross_entropy(case)
    if name == "negative_log_z":
        assert (1 + 2 * case.z_loss * wanted.log_z_BT < 0).any()
    _assert_close(_run(case, implementation, head_dims=head_dims), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_scale_with_what_multiplies_the_objective(implementation):
    case = _case(z_loss=0.3)
    wanted = oracle.cross_entropy(case)
    scaled = wanted[:3] + tuple(-2.5 * gradient for gradient in wanted[3:])
    _assert_close(_run(case, implementation, factor=-2.5), scaled)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(data=st.data())
def test_any_shape_and_chunk(implementation, data):
    sizes = st.integers(1, 7)
    shape = tuple(data.draw(sizes) for _ in range(4))
    chunk = data.draw(st.integers(1, 50))
    softcap = data.draw(st.sampled_from([None, 0.8]))
    case = _case(shape=shape, seed=data.draw(st.integers(0, 9)), softcap=softcap, z_loss=0.1)
    _assert_close(_run(case, implementation, chunk=chunk), oracle.cross_entropy(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(implementation):
    case = _case(scale=1e4, z_loss=0.3)
    _assert_close(_run(case, implementation), oracle.cross_entropy(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_without_weight_have_no_gradient(implementation):
    case = _case(z_loss=0.3)
    result = _run(case, implementation)
    is_counted = case.weights_BT > 0
    assert (result.dx_BTD[~is_counted] == 0).all() and (result.dx_BTD[is_counted] != 0).any()
    rows = np.flatnonzero(is_counted)
    alone = [x.reshape(-1, 1, *x.shape[2:])[rows] for x in case[:1] + case[2:4]]
    counted = oracle.Case(alone[0], case.head_VD, *alone[1:], z_loss=case.z_loss)
    helpers.assert_close(result.dhead_VD, oracle.cross_entropy(counted).dhead_VD, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_products_give_float32_losses(implementation):
    case = _case(**CASES["everything"])
    rounded = case._replace(
        x_BTD=np.float64(jnp.asarray(case.x_BTD, jnp.bfloat16)),
        head_VD=np.float64(jnp.asarray(case.head_VD, jnp.bfloat16)),
    )
    result = _run(case, implementation, dtype="bfloat16")
    dtypes = [np.asarray(array).dtype for array in result]
    assert dtypes == ["float32"] * 3 + [jnp.bfloat16] + ["float32"] * 2
    _assert_close(result, oracle.cross_entropy(rounded), 2e-2)


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_a_target_near_certainty_keeps_its_small_gradient(implementation):
    """Of a probability of 0.999 what is left is 0.001: it must not drown in rounding to bfloat16."""
    case = _case()
    # Steps of 1/8 that bfloat16 holds: all that is rounded is what the implementation rounds.
    x, head = np.round(case.x_BTD * 8) / 8, np.round(case.head_VD * 8) / 8
    place = (0, 1)
    target = case.targets_BT[place]
    head[target] += 2 * np.sign(x[place])
    weights = np.zeros((B, T))
    weights[place] = 1.0
    case = case._replace(x_BTD=x, head_VD=head, weights_BT=weights)
    wanted = oracle.cross_entropy(case)
    assert 0.9 < math.exp(-wanted.cross_entropy_BT[place]) < 0.9999
    result = _run(case, implementation, dtype="bfloat16")
    helpers.assert_close(np.float64(result.dx_BTD), wanted.dx_BTD, 4e-2)
    helpers.assert_close(np.float64(result.dhead_VD), wanted.dhead_VD, 4e-2)


# --- devices ----------------------------------------------------------------------------------

# Sizes along replica, data, seq, expert, tensor.
MESHES = {
    "dp": ((1, 4, 1, 1, 1), "dp"),
    "fsdp": ((1, 4, 1, 1, 1), "fsdp"),
    "fsdp_replica": ((2, 2, 1, 1, 1), "fsdp"),
    "fsdp_tp": ((2, 2, 1, 1, 2), "fsdp_tp"),
    "fsdp_tp_seq": ((1, 2, 2, 1, 2), "fsdp_tp"),
    "tp": ((1, 2, 1, 1, 4), "tp"),
    "one": ((1, 1, 1, 1, 1), "fsdp_tp"),
}


def _place(arrays, head_dims, mesh, rules):
    specs = (rules.act("BTD"), rules.param(head_dims), rules.act("BT"), rules.act("BT"))
    return tuple(
        jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs)
    )


# The compiler cuts the reference up: one mesh that cuts everything shows that it is placed well.
_PLACED = [("chunked", name, "VD") for name in MESHES] + [
    ("chunked", "fsdp_tp", "DV"),
    ("chunked", "fsdp", "DV"),
    ("pallas", "fsdp_tp", "VD"),
    ("pallas", "fsdp_tp_seq", "DV"),
    ("reference", "fsdp_tp_seq", "VD"),
]


@pytest.mark.parametrize("implementation, name, head_dims", _PLACED)
def test_any_mesh_equals_the_oracle(implementation, name, head_dims):
    """Each shard's first and last id are targets, so that an edge off by one shows."""
    case = _case(**CASES["everything"])
    edges = [0, 4, 5, 9, 10, 14, 15, 19]
    case.targets_BT.flat[: 2 * len(edges) : 2] = edges
    case.weights_BT.flat[: 2 * len(edges) : 2] = 1.0
    mesh, rules = helpers.make_mesh(*MESHES[name])
    with jax.set_mesh(mesh):
        arrays = _place(_arrays(case, head_dims), head_dims, mesh, rules)
        result = _run(case, implementation, arrays, head_dims, chunk=2)
    _assert_close(result, oracle.cross_entropy(case))


def _gradient_program(mesh_name, chunk=2, shape=(B, T, D, V), implementation="chunked"):
    """Returns the traced gradient of a case on a mesh, and its arguments."""
    case = _case(shape=shape)
    mesh, rules = helpers.make_mesh(*MESHES[mesh_name])

    def objective(x, head, targets, weights):
        how = {"head_dims": "VD", "implementation": implementation, "chunk": chunk}
        how |= {"z_loss": 0.1, "blocks": BLOCKS}
        return op.cross_entropy(x, head, targets, weights, **how).objective

    with jax.set_mesh(mesh):
        arrays = _place(_arrays(case), "VD", mesh, rules)
        return jax.jit(jax.grad(objective, (0, 1))).trace(*arrays)


def _equations(jaxpr, is_in_loop=False):
    """Yields each equation of a program and whether it is repeated."""
    for equation in jaxpr.eqns:
        yield equation, is_in_loop
        is_loop = equation.primitive.name in ("scan", "while")
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner, is_in_loop or is_loop)


_COLLECTIVES = ("psum", "all_gather", "reduce_scatter", "pmax", "all_to_all", "ppermute")


@pytest.mark.parametrize(
    "mesh, outside, inside",
    [
        ("fsdp", ["all_gather", "reduce_scatter"], []),
        ("fsdp_replica", ["all_gather", "psum", "reduce_scatter"], []),
        ("dp", ["psum"], []),
        # Statistics of tokens are exchanged in each chunk; states' gradients once.
        ("tp", ["psum", "psum"], ["all_gather"]),
        ("fsdp_tp", ["all_gather", "psum", "psum", "reduce_scatter"], ["all_gather"]),
    ],
)
def test_chunks_exchange_nothing_but_statistics(mesh, outside, inside):
    program = _gradient_program(mesh).jaxpr
    found = {False: [], True: []}
    for equation, is_in_loop in _equations(program):
        name = equation.primitive.name.removesuffix("_invariant")
        if name in _COLLECTIVES:
            found[is_in_loop].append(name)
            if is_in_loop:
                assert max(math.prod(v.aval.shape) for v in equation.invars) == 3 * 2
    assert sorted(found[False]) == outside and found[True] == inside


def test_compiled_loop_has_no_collective():
    """What the compiler makes of it: one gather and one scatter of the head, none in the loop."""
    text = _gradient_program("fsdp").lower().compile().as_text()
    computations = re.split(r"\n(?=%|ENTRY)", text)
    loops = set(re.findall(r"body=%([\w.\-]+)", text))
    bodies = [part for part in computations if part.split(" ")[0].lstrip("%") in loops]
    assert bodies
    kinds = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    assert not any(re.search(kinds, body) for body in bodies)
    found = re.findall(kinds, text)
    assert found.count("all-gather") == 1 and 1 <= len(found) <= 4, found


@pytest.mark.parametrize("mesh", ["one", "fsdp_tp"])
def test_logits_never_exist_whole(mesh):
    """Neither traced nor compiled; the reference shows that the search finds them."""
    shape, chunk = (4, 32, 8, 64), 4
    tokens, ids = {"one": (4 * 32, 64), "fsdp_tp": (32, 32)}[mesh]

    def largest(implementation):
        """Elements of the largest array that is not of the size of states or head."""
        program = _gradient_program(mesh, chunk, shape, implementation)
        text = str(program.jaxpr) + program.lower().compile().as_text()
        shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
        sizes = {tuple(map(int, found.split(","))) for found in shapes}
        return max(math.prod(size) for size in sizes if ids in size)

    assert largest("reference") >= tokens * ids
    # Of the arrays that have a dimension of ids, the head [V, D] is larger than a chunk's logits.
    assert largest("chunked") == ids * 8 < tokens * ids
    assert largest("pallas") == ids * 8


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_evaluation_gives_the_same_losses(implementation):
    case = _case(**CASES["everything"])
    how = {"head_dims": "VD", "implementation": implementation, "chunk": CHUNK, "blocks": BLOCKS}
    losses = op.cross_entropy(*_arrays(case), softcap=case.softcap, z_loss=case.z_loss, **how)
    _assert_close(losses, oracle.cross_entropy(case)[:3])


def test_evaluation_makes_no_gradient():
    """Without a gradient asked for, each chunk is one product, and nothing is summed over chunks."""
    arrays = _arrays(_case())

    def score(x, head, targets, weights):
        how = {"head_dims": "VD", "implementation": "chunked", "chunk": CHUNK}
        return op.cross_entropy(x, head, targets, weights, **how)

    def count(function):
        names = [e.primitive.name for e, _ in _equations(jax.make_jaxpr(function)(*arrays).jaxpr)]
        return names.count("dot_general")

    assert count(score) == 1
    assert count(jax.grad(lambda *a: score(*a).objective, (0, 1))) == 3


# --- what is refused, what is chosen ------------------------------------------------------------


def test_a_gradient_of_a_tokens_loss_is_refused_by_chunks():
    x, *rest = _arrays(_case())
    how = {"head_dims": "VD", "chunk": CHUNK}

    def loss(implementation):
        return lambda x: jnp.sum(
            op.cross_entropy(x, *rest, implementation=implementation, **how).cross_entropy_BT
        )

    assert np.abs(jax.grad(loss("reference"))(x)).max() > 0
    with pytest.raises(ValueError, match="only the 'reference' has it"):
        jax.jit(jax.grad(loss("chunked")))(x)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dims": "VT"}, "use 'VD' or 'DV'"),
        ({"head_dims": "DV"}, r"\(4, 6, 8\) do not fit a head \[D,V\] = \(20, 8\)"),
        ({"chunk": 0}, "chunk = 0"),
        ({"implementation": "fused"}, "'fused' is none of auto, reference, chunked, pallas"),
        ({"targets_BT": jnp.zeros((4, 5), jnp.int32)}, r"targets \[B,T\] = \(4, 5\)"),
        ({"weights_BT": jnp.zeros((24,))}, r"weights \[B,T\] = \(24,\)"),
        ({"x_BTD": jnp.zeros((24, 8))}, r"\(24, 8\) do not fit a head"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    names = ("x_BTD", "head", "targets_BT", "weights_BT")
    arguments = dict(zip(names, _arrays(_case())))
    arguments |= {"head_dims": "VD", "implementation": "chunked", "chunk": CHUNK} | changes
    with pytest.raises(ValueError, match=message):
        op.cross_entropy(**arguments)


def test_a_sharding_that_chunks_cannot_follow_is_refused():
    mesh, rules = helpers.make_mesh((1, 2, 1, 1, 2), "fsdp_tp")
    x, head, targets, weights = _arrays(_case())
    how = {"head_dims": "VD", "implementation": "chunked", "chunk": CHUNK}
    with jax.set_mesh(mesh):
        x, head, targets, weights = _place((x, head, targets, weights), "VD", mesh, rules)
        split = jax.sharding.reshard(x, jax.P(None, None, "tensor"))
        with pytest.raises(ValueError, match="whole hidden states"):
            op.cross_entropy(split, head, targets, weights, **how)
        crossed = jax.sharding.reshard(head, jax.P("data", "tensor"))
        with pytest.raises(ValueError, match="other mesh axes"):
            op.cross_entropy(x, crossed, targets, weights, **how)


@pytest.mark.parametrize(
    "tokens, ids, mesh, device_kind, wanted",
    [
        (8192, 131_072, "one", "cpu", "chunked"),
        (8192, 131_072, "one", "TPU v5 lite", "chunked"),
        (8192, 131_072, "one", "TPU v6 lite", "pallas"),
        (8192, 256, "one", "TPU v6 lite", "reference"),
        (8192, 65_536, "one", "cpu", "reference"),  # 2 GiB
        (1024, 1 << 20, "one", "cpu", "reference"),  # no more tokens than a chunk
        (8192, 131_072, "fsdp_tp", "cpu", "reference"),  # an eighth of it on each device
    ],
)
def test_auto_goes_by_the_size_of_logits(
    tokens, ids, mesh, device_kind, wanted, caplog, monkeypatch
):
    monkeypatch.setattr(placement, "device_kind", lambda: device_kind)
    op._say.cache_clear()
    device_mesh, rules = helpers.make_mesh(*MESHES[mesh])

    def score(*arrays):
        return op.cross_entropy(*arrays, head_dims="VD", implementation="auto", chunk=1024)

    with jax.set_mesh(device_mesh), caplog.at_level(logging.INFO, logger=op.__name__):
        shapes = ((4, tokens // 4, 8), (ids, 8), (4, tokens // 4), (4, tokens // 4))
        specs = (rules.act("BTD"), rules.param("VD"), rules.act("BT"), rules.act("BT"))
        dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
        arrays = [
            jax.ShapeDtypeStruct(shape, d, sharding=jax.sharding.NamedSharding(device_mesh, spec))
            for shape, d, spec in zip(shapes, dtypes, specs)
        ]
        for _ in range(2):
            jax.eval_shape(score, *arrays)
    assert [record.message.rpartition(" ")[2] for record in caplog.records] == [wanted]


def test_the_config_names_what_the_operation_takes():
    assert config_lib.CROSS_ENTROPIES == op.IMPLEMENTATIONS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [768, 2048, 4096, 8192])
@pytest.mark.parametrize("ids", [50_304, 128_256, 32_000, 250])
@pytest.mark.parametrize("tokens", [8192, 1100, 40])
def test_blocks_fit_in_vmem_and_waste_little(tokens, ids, width, dtype):
    blocks = kernels.fit(tokens, ids, width, dtype)
    size = jnp.dtype(dtype).itemsize
    pipelined = 2 * blocks.tokens * width * size * 2 + 2 * blocks.ids * width * (size + 8)
    scratch = blocks.tokens * (4 * width + size * blocks.ids + 8 * blocks.tile)
    assert pipelined + scratch <= kernels.VMEM_LIMIT
    assert blocks.tokens % 128 == blocks.ids % 128 == blocks.tile % 128 == 0
    assert -tokens % blocks.tokens < 128 * -(-tokens // blocks.tokens)
    assert -ids % blocks.ids < max(128, 0.02 * ids)


def test_states_too_wide_for_vmem_are_refused():
    with pytest.raises(ValueError, match="width 65536; use 'chunked'"):
        kernels.fit(8192, 50_304, 65_536, jnp.bfloat16)
    with pytest.raises(ValueError, match="tile = 256 does not divide ids = 384"):
        kernels.Blocks(ids=384, tile=256)
