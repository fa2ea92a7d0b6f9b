"""One of the processes of a layout that is spread over several: saves, then restores what others saved.

    python tests/checkpoint/worker.py ADDRESS PROCESS NAME SAVED RESULTS SOURCE...

SAVED/SOURCE is the folder of a run for each layout; RESULTS gets `saved` and `SOURCE-PARTS`.
"""

import pathlib
import sys

import jax

from tests.checkpoint import layouts


def main(address: str, process: str, name: str, saved: str, results: str, *sources: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    layout = layouts.LAYOUTS[name]
    jax.distributed.initialize(address, layout.num_processes, int(process))
    assert jax.process_count() == layout.num_processes
    found = {"saved": layouts.save(name, pathlib.Path(saved) / name)}
    for source in (name, *sources):
        for parts in layouts.PARTS:
            found[f"{source}-{parts}"] = layouts.restore(name, pathlib.Path(saved) / source, parts)
    if jax.process_index() == 0:
        for key, result in found.items():
            result.write(pathlib.Path(results) / key)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
