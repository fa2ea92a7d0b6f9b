"""Compiles the programs that MaxText was compiled for, and puts ours beside: no TPU needed.

    python tests/benchmarks/maxtext.py --cache=DIR

MaxText 0.2.5 with jax 0.11.1 on a machine of the same kind, by its `train_compile`: HBM as it prints it,
and cycles, the compiler's `estimated_cycles` of each operation in the optimised program times the turns of
the loops that it stands in. That leaves out what has no estimate: Pallas kernels and collectives, in both.
"""

import dataclasses
import importlib.metadata
import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import gpt2_124m  # noqa: E402
from llm_jax import command  # noqa: E402
from llm_jax import config as config_lib  # noqa: E402
from llm_jax.aot import kernel_cost  # noqa: E402
from llm_jax.aot import topology  # noqa: E402
from llm_jax.plan import planner  # noqa: E402

_LLAMA2_7B = config_lib.ModelConfig(
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    mlp_dim=11_008,
    vocab_size=32_000,
    max_length=8192,
    tie_embeddings=False,
    dtype="bfloat16",
    scan_layers=True,
)
_LLAMA3_8B = dataclasses.replace(
    _LLAMA2_7B, num_kv_heads=8, mlp_dim=14_336, vocab_size=128_256, rope_theta=500_000.0
)
_GPT2_124M = config_lib.from_config_dict(gpt2_124m.get_config()).model
_GPT3_6B = dataclasses.replace(
    _GPT2_124M,
    num_layers=48,
    embed_dim=3072,
    head_dim=256,
    mlp_dim=12_288,
    vocab_size=32_768,
    max_length=16_384,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """One of MaxText's programs, and ours.

    Attributes:
      rows: of `length` tokens, on each chip.
      remat: ours; MaxText's is the same unless `name` says so.
      peer_gib, peer_cycles: MaxText's; None: not counted.
    """

    name: str
    model: config_lib.ModelConfig
    slice_name: str
    rows: int
    length: int
    remat: str
    peer_gib: float
    peer_cycles: float | None

    def config(self, num_chips: int) -> config_lib.RunConfig:
        """Returns the run that compiles to this program."""
        return config_lib.RunConfig(
            model=dataclasses.replace(self.model, remat=self.remat),
            data=config_lib.DataConfig(
                batch_size=self.rows * num_chips, sequence_length=self.length, packing="packed"
            ),
        )


PROGRAMS = (
    Program("Llama 2 7B", _LLAMA2_7B, "v5e:16x16", 4, 2048, "full", 5.69, 4.754e9),
    Program(
        "Llama 2 7B, tuned (save_qkv_proj)",
        _LLAMA2_7B,
        "v5e:16x16",
        4,
        2048,
        "qkv",
        11.51,
        4.197e9,
    ),
    Program("Llama 3 8B", _LLAMA3_8B, "v5e:16x16", 1, 4096, "full", 5.45, 2.513e9),
    Program("Llama 3 8B", _LLAMA3_8B, "v5p:4x4x4", 2, 8192, "full", 18.72, 4.747e9),
    Program("Llama 3 8B", _LLAMA3_8B, "v6e:16x16", 2, 8192, "full", 14.72, 3.626e9),
    Program("GPT-2 124M", _GPT2_124M, "v5e:2x2", 16, 1024, "full", 3.29, 0.359e9),
    Program("GPT-2 124M", _GPT2_124M, "v5e:4x4", 16, 1024, "full", 3.92, 0.648e9),
    Program("GPT-2 124M", _GPT2_124M, "v5e:4x4", 16, 1024, "none", 9.80, 0.690e9),
    # MaxText's as in the row before.
    Program(
        "GPT-2 124M, ours keeping products", _GPT2_124M, "v5e:4x4", 16, 1024, "dots", 9.80, 0.690e9
    ),
    Program("Llama 2 7B", _LLAMA2_7B, "v5e:4x4", 4, 2048, "full", 15.21, None),
    Program("GPT-3 6B", _GPT3_6B, "v5e:16x16", 8, 1024, "full", 5.76, 3.995e9),
)


def cycles(cost: kernel_cost.ProgramCost) -> float:
    """Returns the compiler's estimates; kernels, collectives and some copies have none."""
    counted = (one for one in cost.operations if not one.is_kernel and not one.guesses)
    return sum(one.cycles * one.num_executions for one in counted)


def define_flags() -> None:
    flags.DEFINE_string("cache", None, "Folder that keeps what was compiled.")
    flags.DEFINE_list("only", [], "Numbers of the programs to compile, from 0; default: all.")


def main() -> None:
    print(
        f"jax {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}\n"
    )
    print(
        "| program | slice | rows x length | remat | GiB, MaxText | ours | Gcycles, MaxText | ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number, program in enumerate(PROGRAMS):
        if flags.FLAGS.only and str(number) not in flags.FLAGS.only:
            continue
        num_chips = topology.parse(program.slice_name).num_chips
        case = planner.step_case(program.config(num_chips), program.slice_name)
        (cost,) = kernel_cost.costs(
            [dataclasses.replace(case, is_executed=False)],
            cache_directory=flags.FLAGS.cache,
            timeout_seconds=planner.TIMEOUT_SECONDS,
        )
        size = f"{program.rows} x {program.length:,}"
        row = [program.name, program.slice_name, size, program.remat, f"{program.peer_gib}"]
        if isinstance(cost, kernel_cost.Refusal):
            row += [cost.reason, "", ""]
        else:
            row.append(f"{cost.memory.peak / 2**30:.2f}")
            peer = program.peer_cycles
            row += ["-" if peer is None else f"{peer / 1e9:.3f}", f"{cycles(cost) / 1e9:.3f}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    command.run(main, define_flags)
