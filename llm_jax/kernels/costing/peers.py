"""Other people's attention kernels as programs for a TPU, to stand beside ours in the report.

JAX's own flash and splash attention and tokamax's splash attention, each with the settings that win
somewhere in a search over blocks and the VMEM limit.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import importlib.util

import jax
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
import numpy as np

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes

_TOKAMAX = "tokamax._src.ops.experimental.tpu.splash_attention"
# What scoped VMEM a kernel may use, for those that do not say it themselves; the default is 16 MiB.
_WIDE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": str(96 * 1024)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run a peer.

    Attributes:
      peer: "jax flash", "jax splash" or "tokamax splash".
      blocks: queries and keys of a block, keys of a step within it.
      skips_diagonal: tokamax's option to leave out what lies above the diagonal within a block.
      has_wide_vmem: 96 MiB of scoped VMEM instead of the compiler's default.
    """

    peer: str
    blocks: tuple[int, int, int]
    skips_diagonal: bool = False
    has_wide_vmem: bool = True

    def __str__(self) -> str:
        words = [self.peer, "/".join(map(str, self.blocks))]
        if self.skips_diagonal:
            words.append("diagonal skipped")
        return " ".join(words)


def settings(shape: shapes.Attention) -> list[Setting]:
    """Returns the settings worth a compilation for a shape; tokamax's if it is installed."""
    found = [
        Setting("jax flash", (1024, 1024, 1024)),
        Setting("jax splash", (1024, 1024, 512)),
        Setting("jax splash", (1024, 1024, 1024)),
    ]
    if is_tokamax_installed():
        found.append(Setting("tokamax splash", (1024, 1024, 512)))
        if shape.mask == "causal":
            found.append(Setting("tokamax splash", (1024, 1024, 1024), skips_diagonal=True))
    return [setting for setting in found if refusal(setting, shape) is None]


def small_settings(shape: shapes.Attention) -> list[Setting]:
    """Returns a setting of each peer that takes a shape, with blocks for short lengths."""
    names = ["jax flash", "jax splash", *(["tokamax splash"] if is_tokamax_installed() else [])]
    found = [Setting(name, (512, 512, 512)) for name in names]
    return [setting for setting in found if refusal(setting, shape) is None]


def is_tokamax_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def refusal(setting: Setting, shape: shapes.Attention) -> str | None:
    """Returns what a peer lacks for a shape, None if it has all of it."""
    if shape.length % max(setting.blocks):
        return f"needs lengths that {max(setting.blocks)} divides"
    if shape.mask.startswith("packed"):
        return "visits every causal block"
    if shape.bias is not None and (setting.peer, shape.bias) != ("jax flash", "array"):
        return f"has no bias of kind {shape.bias}"
    if setting.peer == "jax flash":
        if shape.softcap is not None or shape.has_sinks or shape.mask.startswith("window"):
            return "has neither soft-cap, sinks nor windows"
        if shape.value_width not in (None, shape.width) or shape.key_heads is not None:
            return "needs as many and as wide values as queries"
    if setting.peer == "tokamax splash" and shape.has_sinks:
        return "has no sinks here"
    return None


def case(setting: Setting, shape: shapes.Attention, slice_name: str) -> kernel_cost.Case:
    """Returns the program to cost."""
    return kernel_cost.Case(
        f"{__name__}:attention",
        slice_name,
        {"setting": dataclasses.asdict(setting), "shape": dataclasses.asdict(shape)},
        _WIDE_VMEM if setting.has_wide_vmem else {},
    )


def attention(
    devices: Sequence[jax.Device], *, setting: Mapping, shape: Mapping, layout: str = "BHTC"
) -> jax.stages.Lowered:
    """Lowers a peer for one device; arguments as `programs.attention`.

    Raises:
      ValueError: what the peer does not take.
    """
    chosen, wanted = Setting(**setting), shapes.Attention(**shape)
    reason = refusal(chosen, wanted)
    if reason is not None:
        raise ValueError(f"{chosen.peer} {reason}")
    run = attend(chosen, wanted, layout, is_scaled=True)
    return programs.lower(run, wanted, devices[0], layout)


def attend(
    setting: Setting, shape: shapes.Attention, layout: str, is_scaled: bool = False
) -> Callable[[Mapping[str, jax.Array]], jax.Array]:
    """Returns a peer as a function of its arrays by name, as `programs.attend`.

    Splash attention leaves the scale of the scores to its caller; `is_scaled` says that the queries have
    it already, perhaps from the projection before.
    """
    if setting.peer == "jax flash":
        inner = _flash(setting, shape)
    else:
        inner = _splash(setting, shape, 1.0 if is_scaled else shape.width**-0.5)

    def run(arrays):
        x = dict(arrays)
        if layout == "BTHC":
            x |= {name: arrays[name].swapaxes(1, 2) for name in ("q", "k", "v")}
        y_BHTC = inner(x)
        return y_BHTC.swapaxes(1, 2) if layout == "BTHC" else y_BHTC

    return run


def decode(devices: Sequence[jax.Device], *, shape: Mapping) -> jax.stages.Lowered:
    """Lowers JAX's ragged paged attention for one device; `shape` has the fields of `shapes.Decode`.

    Raises:
      ValueError: a contiguous or rounded cache.
    """
    case, device = shapes.Decode(**shape), devices[0]
    if case.page is None or case.dtype == "int8":
        raise ValueError(f"ragged paged attention reads pages of the compute dtype, not {case}")
    B, K, T = len(case.lengths), case.key_heads, case.queries
    table = case.page_table()
    mesh = jax.sharding.Mesh(np.asarray(devices[:1]), ("x",)).abstract_mesh

    def attend(q, kv_pages):
        with jax.sharding.use_abstract_mesh(mesh):  # it looks up its chip there
            return ragged_paged_attention.ragged_paged_attention(
                q,
                kv_pages,
                np.asarray(case.lengths, np.int32),
                table,
                (np.arange(B + 1) * T).astype(np.int32),
                np.asarray([B], np.int32),
                sliding_window=case.window,
                num_kv_pages_per_block=max(512 // case.page, 1),
                num_queries_per_block=B * T,
                vmem_limit_bytes=96 * 2**20,
            )

    q = topology.array((B * T, K * case.group, case.width), "bfloat16", device)
    kv_pages = topology.array((table.size, case.page, 2 * K, case.width), "bfloat16", device)
    return jax.jit(attend).lower(q, kv_pages)


def _flash(setting: Setting, shape: shapes.Attention):
    q, k, step = setting.blocks
    sizes = flash_attention.BlockSizes(
        block_q=q,
        block_k_major=k,
        block_k=step,
        block_b=1,
        block_q_major_dkv=q,
        block_k_major_dkv=k,
        block_k_dkv=step,
        block_q_dkv=q,
        block_k_major_dq=k,
        block_k_dq=step,
        block_q_dq=q,
    )

    def run(x):
        bias = x.get("array")
        if bias is not None:
            bias = bias.reshape(1, shape.heads, *bias.shape[3:])
            bias = jax.numpy.broadcast_to(bias, (shape.batch, *bias.shape[1:]))
        return flash_attention.flash_attention(
            x["q"],
            x["k"],
            x["v"],
            bias,
            causal=shape.mask == "causal",
            sm_scale=shape.width**-0.5,
            block_sizes=sizes,
        )

    return run


def _splash(setting: Setting, shape: shapes.Attention, scale: float):
    q, k, step = setting.blocks
    blocks = {
        "block_q": q,
        "block_kv": k,
        "block_kv_compute": step,
        "block_q_dkv": q,
        "block_kv_dkv": k,
        "block_kv_dkv_compute": step,
        "use_fused_bwd_kernel": True,
    }
    if setting.peer == "jax splash":
        kernel, masks = splash_attention_kernel, splash_attention_mask
        how = {
            "block_sizes": kernel.BlockSizes(**blocks),
            "attn_logits_soft_cap": shape.softcap,
            "head_shards": 1,
        }
    else:
        kernel = importlib.import_module(f"{_TOKAMAX}.splash_attention_kernel")
        masks = importlib.import_module(f"{_TOKAMAX}.splash_attention_mask")
        skips = {"qk_diag_skip": True, "sv_diag_skip": True} if setting.skips_diagonal else {}
        config = kernel.SplashConfig(**blocks, **skips, attn_logits_soft_cap=shape.softcap)
        how = {"config": config}
    square, (name, _, number) = (shape.length,) * 2, shape.mask.partition(" ")
    mask = {
        "causal": lambda: masks.CausalMask(square),
        "full": lambda: masks.FullMask(square),
        "window": lambda: masks.LocalMask(square, (int(number) - 1, 0), 0),
    }[name]()
    if setting.peer == "jax splash":
        mask = masks.MultiHeadMask([mask] * shape.heads)
    # Tables of whole words: those of bytes cost the kernel a shift more, and the cost model a guess.
    run = kernel.make_splash_mha(mask, q_seq_shards=1, downcast_smem_data=False, **how)

    def attend(x):
        how = {"sinks": x["sinks"].reshape(-1)} if "sinks" in x else {}
        q = x["q"] if scale == 1.0 else x["q"] * scale
        return jax.vmap(lambda *qkv: run(*qkv, **how))(q, x["k"], x["v"])

    return attend
