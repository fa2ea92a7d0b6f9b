"""A command that several processes run together, small enough to start fast: `SCENARIO` says what."""

import os
import sys
import time

from absl import flags

from llm_jax import command
from llm_jax import distributed
from llm_jax import errors


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
    distributed.on_loss(lambda: f"{count} fingers are saved")
    if this == 1:
        time.sleep(1)
        raise KeyError("broken on purpose")
    distributed.gather("the other never comes")


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
