"""The process that compiles: `python -m llm_jax.aot.worker DIRECTORY`, started by `kernel_cost`.

DIRECTORY holds request.json; results are appended to answers.jsonl in it, so that those before a
crash of the compiler are not lost. The compiler's text goes there as well, and is deleted each time.
"""

from collections.abc import Collection
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time
import traceback

import jax

from llm_jax import errors
from llm_jax.aot import hlo
from llm_jax.aot import kernel_cost
from llm_jax.aot import network
from llm_jax.aot import schedule
from llm_jax.aot import topology

# The pass whose bundles still stand one for a cycle, and which operations share a program.
_PASSES = ".*(packed-bundles-post-ra|deduplication-map).*"

_REASON_LENGTH = 300


def set_flags(dump: pathlib.Path) -> None:
    """Makes libtpu write what is read here; only before libtpu is loaded."""
    flags = (
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={_PASSES}",
    )
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(filter(None, [given, *flags]))


def answer(
    case: kernel_cost.Case, dump: pathlib.Path, cache: pathlib.Path | None, known: Collection[str]
) -> dict:
    """Returns the fields of a `ProgramCost`, a `Refusal` or a `Known`, without the case."""
    lower = _find(case.target)
    devices = topology.devices(case.slice_name)
    try:
        lowered = lower(devices, **case.arguments)
    except Exception as error:  # whatever a program may hold against its arguments
        return _refusal("lowering", error)
    fingerprint = _fingerprint(case, lowered)
    if fingerprint in known:
        return {"known": fingerprint}
    kept = cache / f"{_cache_key(case, fingerprint)}.json" if cache else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir(parents=True)
    started = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=dict(case.compiler_options) or None)
    except Exception as error:  # the compiler's errors have no common type
        return _refusal("compilation", error)
    fields = {"compile_seconds": time.monotonic() - started, "fingerprint": fingerprint}
    fields |= _cost(case, compiled, dump)
    if kept:
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(fields))
        partial.replace(kept)
    return fields


def _find(target: str):
    module_name, _, function_name = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise errors.UserError(f"there is no '{target}' (module:function): {error}") from error


def _refusal(stage: str, error: Exception) -> dict:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if len(reason) > _REASON_LENGTH:
        reason = reason[:_REASON_LENGTH].rpartition(" ")[0] + " ..."
    return {"stage": stage, "reason": reason, "details": traceback.format_exc()}


def _fingerprint(case: kernel_cost.Case, lowered: jax.stages.Lowered) -> str:
    """Returns what a compiled program depends on, as one name."""
    digest = hashlib.sha256(lowered.as_text().encode())
    options = json.dumps(dict(case.compiler_options), sort_keys=True)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").partition("--xla_jf_dump_to")[0]
    version = importlib.metadata.version("libtpu")
    for part in (case.slice_name, options, flags.strip(), version):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _cache_key(case: kernel_cost.Case, fingerprint: str) -> str:
    """Returns what a result depends on: the program, and the code that reads it."""
    digest = hashlib.sha256(f"{fingerprint} {case.is_executed}".encode())
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cost(case: kernel_cost.Case, compiled: jax.stages.Compiled, dump: pathlib.Path) -> dict:
    literals = "".join(path.read_text() for path in dump.glob("*-TLP-hlo.txt"))
    module = hlo.Module(compiled.as_text(), literals)
    chip = topology.chip_of(case.slice_name)
    mesh = _mesh(compiled)
    replay = schedule.Replay(module, dump, chip, mesh and network.Network(mesh, chip))
    totals, operations = replay.run()
    return {
        "seconds": totals.seconds,
        "exposed_seconds": totals.exposed_seconds,
        "hbm_bytes_read": totals.bytes_read,
        "hbm_bytes_written": totals.bytes_written,
        "memory": dataclasses.asdict(memory_of(compiled)),
        "mxu": totals.mxu_seconds / totals.seconds if totals.seconds else 0.0,
        "operations": [dataclasses.asdict(operation) for operation in operations],
        "collectives": [dataclasses.asdict(cost) for cost in replay.communication],
        "not_modelled": sorted(replay.not_modelled),
    }


def _mesh(compiled: jax.stages.Compiled) -> jax.sharding.Mesh | None:
    """Returns the mesh that a program's arguments lie on, or None of a program for one device."""
    for placed in jax.tree.leaves(compiled.input_shardings):
        if isinstance(placed, jax.sharding.NamedSharding) and placed.mesh.size > 1:
            return placed.mesh
    return None


def memory_of(compiled: jax.stages.Compiled) -> kernel_cost.Memory:
    """Returns what a compiled program takes on one device."""
    stats = compiled.memory_analysis()
    return kernel_cost.Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes,
    )


def main(directory: pathlib.Path) -> None:
    # A program that comes from a cache is not compiled, and leaves no text to read.
    jax.config.update("jax_enable_compilation_cache", False)
    # Kernels carry where they are written; a program is to be the same from whichever folder, and
    # whoever calls.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    jax.config.update("jax_traceback_in_locations_limit", 0)
    request = json.loads((directory / "request.json").read_text())
    cache = request["cache_directory"]
    dump = directory / "dump"
    dump.mkdir()
    cases = [kernel_cost.Case(**fields) for fields in request["cases"]]
    if cases[0].is_executed:  # and so all of them
        set_flags(dump)
    for case in cases:
        try:
            result = answer(case, dump, cache and pathlib.Path(cache), request["known"])
        except errors.UserError as error:
            result = {"mistake": str(error)}
        with (directory / "answers.jsonl").open("a") as answers:
            answers.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
