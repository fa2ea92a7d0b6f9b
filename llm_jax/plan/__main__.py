"""`python -m llm_jax.plan --config=configs/llama_7b.py --slice=v5e:4x8`: see the package."""

import logging
import pathlib

from absl import flags

from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.aot import topology
from llm_jax.plan import planner
from llm_jax.plan import sampling
from llm_jax.plan import search
from llm_jax.plan import text

_LOG = logging.getLogger(__name__)
_CACHE = "~/.cache/llm_jax/plans"


def define_flags() -> None:
    command.define_config()
    flags.DEFINE_list(
        "slice",
        [],
        "Slices to plan for, e.g. v5e:4x4,v5p:2x2x4,2*v6e:16x16; default: the config's.",
    )
    flags.DEFINE_bool("search", False, "Try meshes, remat, accumulation, and rank what fits.")
    flags.DEFINE_list(
        "batch_sizes", [], "With --search: batch sizes to try; default: the config's."
    )
    flags.DEFINE_integer("compile", 6, "With --search: how many candidates to compile.", 1)
    flags.DEFINE_bool("sampling", False, "Plan prefill and decode instead of training.")
    flags.DEFINE_integer("num_prompts", 32, "With --sampling: prompts at once.", 1)
    flags.DEFINE_integer("prompt_length", 1024, "With --sampling: tokens of a prompt.", 1)
    flags.DEFINE_integer("max_tokens", 1024, "With --sampling: tokens generated.", 1)
    flags.DEFINE_integer(
        "tensor", 1, "With --sampling: chips that share one copy of the weights.", 1
    )
    flags.DEFINE_integer("processes", 1, "Programs compiled at once.", 1)
    flags.DEFINE_string("cache", _CACHE, "Folder that keeps what was compiled; empty: none.")


def main() -> int:
    config = command.config_from_flags()
    values = flags.FLAGS
    slices = values.slice or [config.slice]
    if slices == ["cpu"]:
        raise errors.UserError(
            "the config names no slice (config.slice = cpu): give --slice=v5e:4x4"
        )
    for name in slices:
        topology.parse(name)
    how = {
        "cache_directory": str(pathlib.Path(values.cache).expanduser()) if values.cache else None,
        "num_processes": values.processes,
    }
    if values.search:
        return _search(config, slices, how)
    if values.sampling:
        return _sampling(config, slices, how)
    _LOG.info("compiling for %s: a minute or more each", ", ".join(slices))
    plans = planner.plan([(config, name) for name in slices], **how)
    for plan in plans:
        _print(text.describe(plan, command.config_name()))
    _print(text.notes(plans))
    return 0 if all(plan.is_compiled for plan in plans) else 1


def _search(config: config_lib.RunConfig, slices: list[str], how: dict) -> int:
    sizes = flags.FLAGS.batch_sizes
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise errors.UserError(f"--batch_sizes={','.join(sizes)}: use positive integers")
    is_fitting = True
    for name in slices:
        _LOG.info("compiling up to %d programs for %s", flags.FLAGS.compile, name)
        found = search.search(
            config,
            name,
            num_compiled=flags.FLAGS.compile,
            batch_sizes=[int(size) for size in sizes],
            **how,
        )
        _print(search.describe(found, command.config_name(), name))
        plans = [plan for plan, _ in found.plans]
        _print(text.notes(plans))
        is_fitting &= plans[0].is_compiled
    return 0 if is_fitting else 1


def _sampling(config: config_lib.RunConfig, slices: list[str], how: dict) -> int:
    values = flags.FLAGS
    sizes = sampling.Sizes(
        values.num_prompts,
        values.prompt_length,
        values.prompt_length + values.max_tokens,
        values.tensor,
    )
    plans = sampling.plan([(config, name) for name in slices], sizes, **how)
    for plan in plans:
        _print(sampling.describe(plan, command.config_name()))
    return 0 if all(plan.is_compiled for plan in plans) else 1


def _print(lines: list[str]) -> None:
    print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    command.run(main, define_flags)
