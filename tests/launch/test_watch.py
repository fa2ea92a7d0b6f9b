"""A run is brought to its end over preemptions and crashes, or given up with a reason."""

import json

import pytest

from launch import tpu
from launch import watch
from tests.launch import conftest

PLACE = ["--project=my-project", "--zone=us-west4-a"]
RUN = ["--config=configs/llama_7b.py", "--workdir=gs://my-bucket/llama", "--spot"]
NUM_STEPS = 500_000  # of the config

DONE = conftest.answer({"step": NUM_STEPS, "outcome": "finished"})
CREATE, DELETE = "queued-resources create", "queued-resources delete"
START = "bash launch/worker.sh start"


def _watch(cloud, *flags, run=RUN):
    return tpu.main(["watch", "demo", *run, *PLACE, "--check_every=2", *flags], cloud.shell())


def _acts(cloud) -> list[str]:
    """Returns what was done that changes something, in order; looking does not."""
    found = []
    for call, verb in zip(cloud.calls(), cloud.verbs()):
        if verb in (CREATE, DELETE):
            found.append(verb.partition(" ")[2])
        elif verb == "queued-resources ssh":
            (command,) = [word for word in call if word.startswith("--command=")]
            acts = ("start", "stop")
            found += [act for act in acts if f"worker.sh {act} " in command]
    return found


def _exit(outcome, code=1, step=100, host="w0"):
    return {"host": host, "outcome": outcome, "code": code, "step": step, "num_steps": NUM_STEPS}


def _play(cloud, polls, *, saved=(), ready="READY"):
    """Lets the run finish after some polls; `saved` are the checkpoints at each look."""
    cloud.rule(
        "storage cat gs://my-bucket/llama/launch/finished", *[conftest.NO_FILES] * polls, DONE
    )
    cloud.rule("storage cat gs://my-bucket/llama/launch/exits/*", conftest.NO_FILES)
    cloud.rule("tpu-vm list", conftest.answer(conftest.nodes(ready)))
    listings = [
        {"stdout": "".join(f"gs://my-bucket/llama/checkpoints/{step}/\n" for step in steps)}
        for steps in saved
    ]
    cloud.rule("storage ls", *(listings or [conftest.NO_FILES]))
    cloud.rule("storage rm", conftest.NO_FILES)


def _exits(cloud, *answers):
    cloud.rule(
        "storage cat gs://my-bucket/llama/launch/exits/*",
        *(
            conftest.NO_FILES
            if records is None
            else {"stdout": "".join(json.dumps(record) + "\n" for record in records)}
            for records in answers
        ),
    )


def test_from_nothing_to_the_end(cloud, capsys):
    _play(cloud, 7)
    queue = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
    cloud.states(None, *queue, "ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["create", "start"]
    said = capsys.readouterr().err
    assert "finished: step 500000 of 500000" in said
    # The chips are the user's to give back, and cost until then.
    assert "demo is not deleted. While ACTIVE: 32 chips x $1.20 = $38.40 an hour" in said
    assert "python -m launch.tpu delete demo --zone=us-west4-a --project=my-project" in said


def test_what_is_done_already_asks_for_nothing(cloud):
    _play(cloud, 0)
    assert _watch(cloud) == 0
    assert _acts(cloud) == []


def test_an_end_of_fewer_steps_is_none(cloud):
    _play(cloud, 3)
    early = conftest.answer({"step": 10, "outcome": "finished"})
    cloud.rule("storage cat gs://my-bucket/llama/launch/finished", early, early, DONE)
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start"]


def test_a_slice_that_is_taken_away_is_asked_for_again_and_the_run_resumed(cloud, capsys):
    _play(cloud, 9, saved=[(), (100,), (100,)])
    taken = conftest.resource("SUSPENDED")
    again = conftest.resource("ACTIVE", created="second")
    cloud.states("ACTIVE", "ACTIVE", "SUSPENDING", taken, "WAITING_FOR_RESOURCES", again)
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start", "delete", "create", "start"]
    starts = [call[-1] for call in cloud.calls() if START in call[-1]]
    assert starts[0] == starts[1]  # the same code and command: it resumes by itself
    creations = [call for call, verb in zip(cloud.calls(), cloud.verbs()) if verb == CREATE]
    assert all("--spot" in call for call in creations)
    said = capsys.readouterr().err
    assert (
        "it was taken away (SUSPENDED): deleting it and asking again (try 1 of 8, in 30 s)" in said
    )


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED"])
def test_machines_that_are_lost_while_the_resource_is_said_to_be_there(cloud, state):
    _play(cloud, 5)
    lost, well = conftest.nodes("READY", state), conftest.nodes("READY", "READY")
    cloud.rule("tpu-vm list", conftest.answer(lost), conftest.answer(well))
    cloud.states("ACTIVE", conftest.resource("ACTIVE", created="second"))
    run = ["--config=configs/llama_7b.py", "--slice=2*v5e:4x8", "--allow_other_slice", RUN[1]]
    assert _watch(cloud, run=run) == 0
    assert _acts(cloud) == ["delete", "create", "start"]


def test_machines_that_are_mended_are_waited_for(cloud):
    _play(cloud, 5)
    states = [
        conftest.answer(conftest.nodes(state)) for state in ("REPAIRING", "CREATING", "READY")
    ]
    cloud.rule("tpu-vm list", *states)
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start"]


def test_a_deleted_resource_is_asked_for_again(cloud):
    _play(cloud, 6)
    again = conftest.resource("ACTIVE", created="second")
    cloud.states("ACTIVE", "ACTIVE", "DELETING", None, again)
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start", "create", "start"]


def test_a_crash_ends_the_others_and_starts_all_again(cloud, capsys):
    _play(cloud, 6)
    _exits(cloud, [_exit("failed", code=-6, host="w3")], None)
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud)[:3] == ["start", "stop", "start"]
    assert "create" not in _acts(cloud)
    assert "the training ended early (w3: failed; codes -6)" in capsys.readouterr().err


def test_a_machine_that_rebooted_is_noticed_though_nothing_was_written(cloud):
    _play(cloud, 8)
    well = {"stdout": '{"host": "w0", "state": "running"}\n'}
    dead = {"stdout": '{"host": "w0", "state": "running"}\n{"host": "w1", "state": "dead"}\n'}
    cloud.rule("worker.sh status", well, dead, well)
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start", "stop", "start"]


def test_machines_that_never_answer_are_replaced(cloud):
    _play(cloud, 10)
    cloud.rule("worker.sh status", {"code": 255, "stderr": "Connection timed out"})
    cloud.states(*["ACTIVE"] * 6, conftest.resource("ACTIVE", created="second"))
    assert _watch(cloud) == 0
    assert _acts(cloud) == [
        "start",
        "delete",
        "create",
        "start",
    ]


def test_stopped_by_hand_stays_stopped(cloud, capsys):
    _play(cloud, 99)
    _exits(cloud, [_exit("stop_requested", code=0)])
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start"]
    assert "stopped by hand" in capsys.readouterr().err


def test_stopped_by_hand_and_killed_stays_stopped(cloud, capsys):
    _play(cloud, 99)
    killed = {"host": "w0", "state": "ended", "outcome": "stop_requested", "code": -9}
    cloud.rule("worker.sh status", {"stdout": json.dumps(killed) + "\n"})
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert "stopped by hand" in capsys.readouterr().err


def test_an_exit_code_of_0_is_not_the_end(cloud):
    _play(cloud, 6)
    _exits(cloud, [_exit("stopped", code=0)], None)
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud)[:3] == ["start", "stop", "start"]


@pytest.mark.parametrize(
    "message",
    [
        "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 32",
        "PERMISSION_DENIED: The caller does not have permission",
        "INVALID_ARGUMENT: runtime version v2-alpha-tpuv9 does not exist",
        "Insufficient reserved capacity. Contact customer support to increase your reservation.",
    ],
)
@pytest.mark.parametrize("moment", ["create", "later"])
def test_what_no_retry_mends_is_given_up(cloud, capsys, message, moment):
    _play(cloud, 99)
    cloud.states(None if moment == "create" else conftest.resource("FAILED", failure=message))
    cloud.rule(CREATE, {"code": 1, "stderr": f"ERROR: (gcloud.alpha) {message}\n"})
    assert _watch(cloud) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "No retry mends that" in said
    assert cloud.sleeps == []
    assert _acts(cloud).count("create") == (moment == "create")


@pytest.mark.parametrize("reason", ["There is no more capacity in the zone", ""])
def test_a_zone_that_is_full_is_asked_again(cloud, reason):
    _play(cloud, 4)
    cloud.states(conftest.resource("FAILED", failure=reason), "ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["delete", "create", "start"]


def test_a_training_that_refuses_its_config_is_given_up(cloud, capsys):
    _play(cloud, 99)
    _exits(cloud, [_exit("failed", code=-6, host="w1"), _exit("failed", code=2)])
    cloud.states("ACTIVE")
    assert _watch(cloud) == 2
    assert "needs a person" in capsys.readouterr().err
    assert _acts(cloud) == ["start"]


def test_without_progress_it_is_given_up_after_growing_pauses(cloud, capsys):
    _play(cloud, 99, saved=[(100,)])
    cloud.states("SUSPENDED")
    assert _watch(cloud, "--max_retries=4", "--poll_seconds=7") == 2
    assert [pause for pause in cloud.sleeps if pause != 7] == [30, 60, 120, 240]
    assert _acts(cloud) == ["delete", "create"] * 4
    assert "try 5 without a new checkpoint since step 100" in capsys.readouterr().err


def test_progress_begins_the_count_anew(cloud):
    steps = [(), (100,), (100, 200), (200, 300), (300, 1000), (1000, 1100)]
    _play(cloud, 5, saved=steps)
    cloud.states("SUSPENDED")
    assert _watch(cloud, "--max_retries=1", "--poll_seconds=7") == 0
    assert set(cloud.sleeps) == {7, 30}


def test_a_start_that_fails_is_made_again(cloud):
    _play(cloud, 5)
    refused = {"code": 255, "stderr": "Connection refused"}
    cloud.rule(START, *[refused] * 5, {"stdout": "started"})
    cloud.states("ACTIVE")
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start"] * 6


def test_a_network_that_is_down_for_a_while_ends_nothing(cloud, capsys):
    _play(cloud, 9)
    down = {"code": 1, "stderr": "ERROR: could not resolve host tpu.googleapis.com"}
    well = conftest.answer(conftest.resource("ACTIVE"))
    cloud.rule("queued-resources describe", well, *[down] * 10, well)
    assert _watch(cloud) == 0
    assert _acts(cloud) == ["start"]
    assert "could not resolve host" in capsys.readouterr().err


def test_an_expired_login_ends_the_watch_but_not_the_run(cloud, capsys):
    _play(cloud, 9)
    expired = {"code": 1, "stderr": "ERROR: Reauthentication failed. Run: gcloud auth login"}
    cloud.rule("queued-resources describe", expired)
    assert _watch(cloud, "--delete_after") == 1
    assert "gcloud auth login" in capsys.readouterr().err
    assert _acts(cloud) == []


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_chips_are_given_back_if_asked_however_it_ends(cloud, is_finished):
    _play(cloud, 2 if is_finished else 99)
    if not is_finished:
        _exits(cloud, [_exit("failed", code=2)])
    cloud.states("ACTIVE")
    assert _watch(cloud, "--delete_after") == (0 if is_finished else 2)
    assert _acts(cloud) == ["start", "delete"]


def test_waiting_says_a_thing_once(cloud, capsys):
    _play(cloud, 30)
    cloud.states(*["WAITING_FOR_RESOURCES"] * 28, "ACTIVE")
    assert _watch(cloud) == 0
    assert capsys.readouterr().err.count("WAITING_FOR_RESOURCES: waiting") == 1


def test_code_is_shipped_once_for_all_starts(cloud):
    _play(cloud, 4)
    cloud.states("ACTIVE", "SUSPENDED", conftest.resource("ACTIVE", created="second"))
    assert _watch(cloud) == 0
    assert cloud.verbs().count("storage cp") == 1


def test_states_are_read_as_the_api_has_them():
    assert watch.state_of(None) is None
    assert watch.state_of({"state": {"state": "ACTIVE"}}) == "ACTIVE"
    assert watch.state_of({}) == "STATE_UNSPECIFIED"
    assert watch.failure_of(conftest.resource("FAILED", failure="why")) == "why"
    assert watch.failure_of(conftest.resource("FAILED")) == ""
