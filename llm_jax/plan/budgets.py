"""What compiled steps may take, committed: `python -m llm_jax.plan.budgets` rewrites the file.

Each entry is a shipped config on a slice, compiled with that chip's flags: HBM, collectives by kind and
axes, and how every parameter is cut. `tests/contracts` holds them to it, so that a change of any of it shows
as a difference of the file: a program that is no longer the one compiled is compiled again. Figures are of
one version of the TPU compiler.
"""

from collections.abc import Mapping
import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
from typing import Any

from absl import flags
import jax

from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import trees
from llm_jax.aot import kernel_cost
from llm_jax.aot import steps
from llm_jax.aot import topology
from llm_jax.plan import planner

PATH = pathlib.Path(__file__).parents[2] / "tests" / "contracts" / "budgets.json"
# Of HBM: compilers may lay out ties anew. Collectives and shardings are to be the same.
_TOLERANCE = 1.01


@dataclasses.dataclass(frozen=True)
class Entry:
    """A config on a slice, with what is changed to fit there."""

    config_name: str
    slice_name: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.config_name} on {self.slice_name}"

    def config(self) -> config_lib.RunConfig:
        """Returns the config, checked."""
        raw = importlib.import_module(f"configs.{self.config_name}").get_config()
        raw.update_from_flattened_dict(dict(self.overrides))
        return config_lib.from_config_dict(raw)

    def case(self) -> kernel_cost.Case:
        """Returns its training step; its time is not asked for."""
        case = planner.step_case(self.config(), self.slice_name)
        return dataclasses.replace(case, is_executed=False)


ENTRIES = (
    Entry("gpt2_124m", "v5e:2x2", {"optim.accumulation_steps": 16}),
    Entry("gpt2_124m", "v5e:4x4"),
    Entry("llama_1b", "v5e:4x4"),
    Entry("llama_7b", "v5e:4x8"),
    Entry("llama_7b", "v6e:4x4"),
    Entry("llama_7b", "v5p:2x2x4"),
    Entry("llama_70b", "v5p:8x8x8"),
    Entry("llama_1b", "2*v5e:4x4", {"mesh.replica": 2}),
    Entry("bert_base", "v5e:4x4"),
    Entry("bert_large", "v5e:4x4"),
    Entry("t5_small", "v5e:4x4"),
    Entry("t5_base", "v5e:4x4"),
    Entry("transformer_base_2017", "v5e:2x2"),
    Entry("smollm2_135m", "v5e:4x4"),
    Entry("qwen3_0_6b", "v5e:4x4"),
    Entry("gemma3_1b", "v5e:4x4"),
    Entry("moe_8x150m", "v5e:4x4"),
    Entry("switch_base", "v5e:8x8"),
    Entry("deepseek_moe_16b", "v5p:4x4x4"),
    Entry("mixtral_8x7b", "v5p:4x4x4"),
)


def compiler_version() -> str:
    """Returns which compiler the figures are of."""
    return f"libtpu {importlib.metadata.version('libtpu')}"


def shardings(config: config_lib.RunConfig, slice_name: str) -> dict[str, str]:
    """Returns how each parameter is cut: "data,-,tensor" for its dimensions, by its path."""
    mesh = mesh_lib.make_abstract(config.mesh, topology.parse(slice_name).num_chips)
    with jax.sharding.use_abstract_mesh(mesh):
        model = steps.abstract_state(config).model
    found = {}
    for name, leaf in trees.by_name(model).items():
        spec = () if leaf.sharding is None else leaf.sharding.spec
        axes = [axis if axis is None or isinstance(axis, str) else "+".join(axis) for axis in spec]
        found[name] = ",".join(axis or "-" for axis in axes)
    return found


def figures(entry: Entry, result: kernel_cost.ProgramCost | kernel_cost.Refusal) -> dict[str, Any]:
    """Returns what is budgeted of an entry.

    Raises:
      errors.UserError: it does not compile.
    """
    if isinstance(result, kernel_cost.Refusal):
        raise errors.UserError(f"{entry.name}: {result.reason}")
    collectives = {
        f"{cost.kind} over {','.join(cost.axes) or '?'}": {
            "times": cost.num_executions,
            "MiB": round(cost.num_bytes / 2**20, 2),
        }
        for cost in result.collectives
    }
    memory = result.memory
    return {
        "program": result.fingerprint,
        "hbm_bytes": memory.peak + memory.code,
        "temporary_bytes": memory.temporaries,
        "collectives": dict(sorted(collectives.items())),
        "shardings": shardings(entry.config(), entry.slice_name),
    }


def load(path: pathlib.Path = PATH) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the figures by compiler version and name."""
    return json.loads(path.read_text()) if path.exists() else {}


def differences(name: str, actual: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """Returns a line for each figure that is not as it was."""
    lines = []
    for figure in ("hbm_bytes", "temporary_bytes"):
        ratio = actual[figure] / budget[figure]
        if not 1 / _TOLERANCE <= ratio <= _TOLERANCE:
            lines.append(
                f"{name}: {figure} {actual[figure]:,} is {ratio:.3f} of {budget[figure]:,}"
            )
    for table in ("collectives", "shardings"):
        for key in sorted(actual[table].keys() | budget[table].keys()):
            now, then = actual[table].get(key), budget[table].get(key)
            if now != then:
                lines.append(f"{name}: {table}: {key}: {then} became {now}")
    return lines


def define_flags() -> None:
    flags.DEFINE_string("cache", None, "Folder that keeps what was compiled.")
    flags.DEFINE_list("only", [], "Names of configs; the others' figures stay.")


def main() -> None:
    chosen = [e for e in ENTRIES if not flags.FLAGS.only or e.config_name in flags.FLAGS.only]
    known = load()
    found = dict(known.get(compiler_version(), {}))
    for entry in chosen:
        (result,) = kernel_cost.costs(
            [entry.case()],
            cache_directory=flags.FLAGS.cache,
            timeout_seconds=planner.TIMEOUT_SECONDS,
        )
        found[entry.name] = now = figures(entry, result)
        print(f"{entry.name}: {now['hbm_bytes'] / 2**30:.2f} GiB", flush=True)
    names = [entry.name for entry in ENTRIES]
    ordered = {name: found[name] for name in names if name in found}
    PATH.write_text(json.dumps(known | {compiler_version(): ordered}, indent=1) + "\n")
    print(f"written: {PATH}")


if __name__ == "__main__":
    command.run(main, define_flags)
