"""A command that several processes run together, small enough to start fast: `SCENARIO` says what."""

import os
import pathlib
import sys
import time

from absl import flags

from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax.data import prepare


def agreeing() -> None:
    """Every way to agree, then one process fails while the other waits for it."""
    this, count = distributed.process_id(), distributed.num_processes()
    assert count == 2 and distributed.is_main() == (this == 0)
    for turn in range(20):  # values of one turn never show in another
        assert distributed.gather([turn, this]) == [[turn, 0], [turn, 1]]
    assert distributed.agree(True) and not distributed.agree(this == 0)
    distributed.check_same("the sky", "blue", "look up")
    try:
        distributed.check_same("the sea", f"colour {this}", "look again")
    except errors.UserError as error:
        print(error, flush=True)
    _preparing()
    distributed.on_loss(lambda: f"{count} fingers are saved")
    if this == 1:
        time.sleep(1)
        raise KeyError("broken on purpose")
    distributed.gather("the other never comes")


def _preparing() -> None:
    """Hosts that share no disk: the same documents will do, others and other workdirs will not."""
    own = pathlib.Path(os.environ["FOLDER"]) / str(distributed.process_id())
    for name, text in (("same", "a text of all"), ("own", f"a text of {own.name}")):
        (own / name).mkdir(parents=True)
        for index in range(3):
            (own / name / f"{index}.txt").write_text(text * (index + 1))

    def prepared(name):
        source = config_lib.DataConfig(source=f"text:{own}/{name}/*.txt", cache_dir=str(own))
        return prepare.prepare(config_lib.RunConfig(data=source))

    prepare.check_same(prepared("same"))
    distributed.check_shared(os.environ["FOLDER"])
    for check in (
        lambda: prepare.check_same(prepared("own")),
        lambda: distributed.check_shared(str(own)),
    ):
        try:
            check()
        except errors.UserError as error:
            print(error, flush=True)


def refusing() -> None:
    """The same mistake on all processes, seen by one of them some time later."""
    time.sleep(distributed.process_id())
    raise errors.UserError("nobody likes this setting")


def done() -> None:
    """Ends well, though one process is late."""
    time.sleep(2 * distributed.process_id())
    print(f"{distributed.process_id()} of {distributed.num_processes()}", flush=True)


def alone() -> None:
    """Waits for others who are never started; not for five minutes, though."""
    raise AssertionError("it met somebody")


def main() -> None:
    {"agreeing": agreeing, "refusing": refusing, "done": done, "alone": alone}[scenario()]()


def scenario() -> str:
    return os.environ["SCENARIO"]


if __name__ == "__main__":
    if scenario() == "alone":
        distributed._MEETING_SECONDS = 2
    assert "coordinator_address" not in flags.FLAGS, sys.argv
    command.run(main, command.define_processes)
