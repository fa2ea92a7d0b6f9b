"""The commands of each verb, and what is refused before the first of them."""

import re
import shlex
import subprocess

import pytest

from launch import code
from launch import tpu
from tests.launch import conftest

PLACE = ["--project=my-project", "--zone=us-west4-a"]
RUN = ["--config=configs/llama_7b.py", "--workdir=gs://my-bucket/llama"]


def _call(cloud, *argv):
    return tpu.main([*argv, *PLACE], cloud.shell())


def _flags(call):
    return dict(word[2:].partition("=")[::2] for word in call if word.startswith("--"))


def _only(cloud, verb):
    (call,) = [call for call, name in zip(cloud.calls(), cloud.verbs()) if name == verb]
    return call


# --- creating -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slice_name", "zone", "accelerator", "runtime"),
    [
        ("v5e:4x8", "us-west4-a", "v5litepod-32", "v2-alpha-tpuv5-lite"),
        ("v5p:2x2x4", "us-east5-a", "v5p-32", "v2-alpha-tpuv5"),
        ("v6e:16x16", "us-east5-b", "v6e-256", "v2-alpha-tpuv6e"),
        ("v4:2x2x1", "us-central2-b", "v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_for_the_slice_by_googles_names(cloud, slice_name, zone, accelerator, runtime):
    cloud.states(None)
    argv = ["create", "demo", f"--slice={slice_name}", "--project=my-project", f"--zone={zone}"]
    assert tpu.main(argv, cloud.shell()) == 0
    assert cloud.verbs() == [
        "accelerator-types describe",
        "queued-resources describe",
        "queued-resources create",
    ]
    flags = _flags(_only(cloud, "queued-resources create"))
    assert flags["accelerator-type"] == accelerator
    assert flags["runtime-version"] == runtime
    assert flags["node-id"] == "demo"
    assert (flags["zone"], flags["project"]) == (zone, "my-project")
    assert not {"spot", "reserved", "node-count"} & set(flags)


def test_several_slices_are_one_resource_of_several_nodes(cloud):
    cloud.states(None)
    assert _call(cloud, "create", "demo", "--slice=2*v5e:16x16", "--spot") == 0
    flags = _flags(_only(cloud, "queued-resources create"))
    assert flags["accelerator-type"] == "v5litepod-256"
    assert (flags["node-count"], flags["node-prefix"]) == ("2", "demo")
    assert "node-id" not in flags
    assert "spot" in flags


def test_reserved_chips_and_the_slice_of_a_config(cloud):
    cloud.states(None)
    assert _call(cloud, "create", "demo", *RUN, "--reserved", "--ssh=iap") == 0
    flags = _flags(_only(cloud, "queued-resources create"))
    assert flags["accelerator-type"] == "v5litepod-32"
    assert {"reserved", "internal-ips"} <= set(flags)


def test_what_is_there_is_not_asked_for_again(cloud):
    cloud.states("WAITING_FOR_RESOURCES")
    assert _call(cloud, "create", "demo", "--slice=v5e:4x8") == 0
    assert "queued-resources create" not in cloud.verbs()


# --- running --------------------------------------------------------------------------------------


def test_run_ships_the_code_and_starts_it_on_all_machines(cloud):
    cloud.rule("storage rm", conftest.NO_FILES)
    override = "--config.optim.learning_rate=1e-4"
    more = [override, "--env=A=b c", "--secret=WANDB_API_KEY=wandb", "--before=echo hello"]
    assert _call(cloud, "run", "demo", *RUN, *more, "--xla_flags=--xla_mine=1") == 0
    assert cloud.verbs() == [
        "storage buckets",
        "storage cp",
        "storage rm",
        "queued-resources ssh",
    ]
    archive = _only(cloud, "storage cp")[-1]
    assert re.fullmatch(r"gs://my-bucket/llama/launch/code-[0-9a-f]{12}\.tar\.gz", archive)
    flags = _flags(_only(cloud, "queued-resources ssh"))
    assert (flags["node"], flags["worker"]) == ("all", "all")
    fetched, started = flags["command"].split("; echo hello; env ")
    assert archive in fetched
    words = shlex.split(started)
    assert words[-2:] == ["--config=configs/llama_7b.py", override]
    assert "--workdir=gs://my-bucket/llama" in words
    assert "A=b c" in words
    assert "LAUNCH_SECRETS=WANDB_API_KEY=my-project/wandb" in words
    (libtpu,) = [word for word in words if word.startswith("LIBTPU_INIT_ARGS=")]
    assert "--xla_tpu_enable_async_collective_fusion=true" in libtpu
    assert libtpu.endswith(" --xla_mine=1")
    assert "data_parallel" not in libtpu


def test_overrides_that_turn_off_go_along(cloud):
    off = ["--config.optim.clip_norm=None", "--noconfig.profile"]
    assert _call(cloud, "run", "demo", *RUN, *off) == 0
    assert shlex.split(_flags(cloud.calls()[-1])["command"])[-2:] == off


def test_machines_that_do_not_answer_yet_are_asked_again(cloud):
    cloud.rule(
        "queued-resources ssh", {"code": 255, "stderr": "Connection refused"}, {"stdout": ""}
    )
    assert _call(cloud, "setup", "demo", *RUN) == 0
    assert cloud.verbs().count("queued-resources ssh") == 2
    assert cloud.sleeps == [10.0]
    assert _flags(cloud.calls()[-1])["command"].endswith("bash launch/worker.sh setup")


def test_logs_stop_and_fetch(cloud):
    assert _call(cloud, "logs", "demo", "--worker=3", "--node=1", "--lines=7") == 0
    flags = _flags(cloud.calls()[-1])
    assert (flags["node"], flags["worker"]) == ("1", "3")
    assert flags["command"] == "tail -n 7 -F llm_jax_runs/demo/log.txt"
    assert _call(cloud, "stop", "demo") == 0
    flags = _flags(cloud.calls()[-1])
    assert (flags["node"], flags["worker"]) == ("all", "all")
    assert flags["command"].endswith("bash launch/worker.sh stop demo")


def test_fetch_leaves_checkpoints_where_they_are_unless_asked(cloud, tmp_path):
    argv = ["fetch", "--workdir=gs://my-bucket/llama", f"--output={tmp_path / 'here'}"]
    assert _call(cloud, *argv) == 0
    call = cloud.calls()[-1]
    assert call[:6] == [
        *("gcloud", "storage", "rsync", "--recursive"),
        *("gs://my-bucket/llama", str(tmp_path / "here")),
    ]
    pattern = _flags(call)["exclude"]
    assert re.match(pattern, "checkpoints/100/params")
    assert not re.match(pattern, "metrics.jsonl")
    assert not re.match(pattern, "launch/logs/host.txt")
    assert _call(cloud, *argv, "--checkpoints") == 0
    assert "exclude" not in _flags(cloud.calls()[-1])


def test_status_and_list_say_what_is_billed(cloud, capsys):
    cloud.states("ACTIVE")
    cloud.rule("tpu-vm list", conftest.answer(conftest.nodes("READY")))
    cloud.rule("queued-resources ssh", {"stdout": '{"host": "w0", "state": "running"}\n'})
    assert _call(cloud, "status", "demo") == 0
    said = capsys.readouterr().err
    assert "demo: ACTIVE" in said
    assert "demo: READY" in said
    assert '"running"' in said
    assert "demo-of-another" not in said
    listed = [conftest.resource("ACTIVE"), conftest.resource("SUSPENDED")]
    cloud.rule("queued-resources list", conftest.answer(listed))
    assert _call(cloud, "list") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("ACTIVE (billed)")
    assert "not billed" in said[1]


# --- deleting -------------------------------------------------------------------------------------


def test_deleting_asks(cloud, monkeypatch, capsys):
    cloud.states("ACTIVE")
    assert _call(cloud, "delete", "demo") == 2  # there is no terminal here
    assert "--yes" in capsys.readouterr().err
    for reply, code_, is_deleted in (("n\n", 2, False), ("\n", 2, False), ("y\n", 0, True)):
        monkeypatch.setattr("sys.stdin", _Terminal(reply))
        assert _call(cloud, "delete", "demo") == code_
        assert ("queued-resources delete" in cloud.verbs()) == is_deleted


def test_deleting_takes_the_machines_along_in_any_state(cloud):
    cloud.states("SUSPENDED")
    assert _call(cloud, "delete", "demo", "--yes") == 0
    assert {"force", "quiet"} <= set(_flags(_only(cloud, "queued-resources delete")))
    cloud.states(None)
    assert _call(cloud, "delete", "demo", "--yes") == 0
    assert cloud.verbs().count("queued-resources delete") == 1


class _Terminal:
    def __init__(self, reply):
        self._reply = reply

    def isatty(self):
        return True

    def readline(self):
        return self._reply


# --- nothing is run -------------------------------------------------------------------------------

CREATE = ["create", "demo", "--slice=v5e:4x8"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["create", "Demo", "--slice=v5e:4x8"], "'Demo' will not do as a name"),
        (["create", "demo-" + "x" * 40, "--slice=v5e:4x8"], "will not do as a name"),
        (["create", "demo"], "--slice is missing"),
        (["create", "demo", "--slice=v5e:4x9"], "v5e has no slice of 4x9 (did you mean"),
        (["create", "demo", "--slice=v5litepod-32"], "not the name of a slice"),
        (["create", "demo", "--slice=v7:2x2"], "no TPU is called 'v7'"),
        (["create", "demo", "--slice=v5p:2x2x2"], "--zone=us-west4-a is not known to offer v5p"),
        (["create", "demo", "--slice=tpu7x:2x2x2"], "python -m launch.gke"),
        ([*CREATE, "--project=x"], "--project=x cannot be"),
        ([*CREATE, "--zone=us-west4"], "--zone=us-west4 cannot be"),
        ([*CREATE, "--workdir=/tmp/x"], "gs://BUCKET/PATH"),
        ([*CREATE, "--workdir=gs://my-bucket"], "gs://BUCKET/PATH"),
        ([*CREATE, "--workdir=gs://my-bucket/a;rm -rf"], "gs://BUCKET/PATH"),
        ([*CREATE, "--sopt"], "'--sopt' is not a flag of 'create'"),
        (["run", "demo", "--config=configs/llama_7b.py"], "gs://BUCKET/PATH"),
        (["run", "demo", "--workdir=gs://my-bucket/x"], "--config is missing"),
        (["run", "demo", "--config=configs/lama_7b.py"], "did you mean 'llama_7b'"),
        (["run", "demo", *RUN, "--config.optim.learning_rat=1"], "did you mean 'learning_rate'"),
        (["run", "demo", *RUN, "--config.model.num_layers=no"], "num_layers"),
        (["run", "demo", *RUN, "--config.model.num_heads=7"], "num_heads"),
        (["run", "demo", *RUN, "--slice=v5e:4x4"], "--allow_other_slice"),
        (["run", "demo", "--config=configs/tiny.py", RUN[1]], "is for a CPU"),
        (["run", "demo", *RUN, "--env=HF_TOKEN=hf_1234"], "--secret=HF_TOKEN=NAME"),
        (["run", "demo", *RUN, "--env=oops"], "takes NAME=VALUE"),
        (["run", "demo", *RUN, "--secret=hf_1234 56"], "not its value"),
        (["watch", "demo", *RUN, "--slice=v6e:4x8"], "v6e"),
        (["logs", "demo", "--config.model.num_layers=2"], "takes no settings"),
        (["fetch", "--workdir=gs://b", "--output=x"], "gs://BUCKET/PATH"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_run(cloud, capsys, argv, said):
    given = [flag for flag in PLACE if not any(a.startswith(flag.split("=")[0]) for a in argv)]
    assert tpu.main([*argv, *given], cloud.shell()) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len([line for line in shown.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in shown.err
    assert "hf_1234" not in shown.err + shown.out
    assert cloud.calls() == []


def test_a_project_and_a_zone_are_needed(cloud, capsys, monkeypatch):
    assert tpu.main(CREATE, cloud.shell()) == 2
    assert "--project is missing" in capsys.readouterr().err
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "my-project")
    monkeypatch.setenv("CLOUDSDK_COMPUTE_ZONE", "us-west4-a")
    cloud.states(None)
    assert tpu.main(CREATE, cloud.shell()) == 0


@pytest.mark.parametrize(
    ("pattern", "played", "said"),
    [
        ("buckets describe", conftest.NO_FILES, "gcloud storage buckets create gs://my-bucket"),
        ("accelerator-types", conftest.NOT_FOUND, "no v5litepod-32 (v5e:4x8) in us-west4-a"),
        (
            "accelerator-types",
            {"code": 1, "stderr": "ERROR: PERMISSION_DENIED: Cloud TPU API has not been used"},
            "Cloud TPU API has not been used",
        ),
    ],
)
def test_what_google_does_not_have_is_found_out_before_anything_is_asked_for(
    cloud, capsys, pattern, played, said
):
    cloud.rule(pattern, played)
    assert _call(cloud, "watch", "demo", *RUN) != 0
    assert said in capsys.readouterr().err
    assert not {"queued-resources create", "storage cp"} & set(cloud.verbs())


def test_a_bucket_far_away_is_warned_of(cloud, capsys):
    cloud.states("ACTIVE")
    for location, is_far in (("EUROPE-WEST4", True), ("US", False), ("US-WEST4", False)):
        cloud.rule("buckets describe", conftest.answer({"location": location}))
        assert _call(cloud, "create", "demo", *RUN) == 0
        assert ("slow and billed" in capsys.readouterr().err) == is_far


@pytest.mark.parametrize(
    "argv",
    [
        ["create", "demo", "--slice=v5e:4x8"],
        ["setup", "demo", *RUN],
        ["run", "demo", *RUN, "--env=A=it's; $HOME"],
        ["watch", "demo", *RUN, "--spot"],
        ["stop", "demo"],
        ["status", "demo"],
        ["logs", "demo"],
        ["fetch", "--workdir=gs://my-bucket/x", "--output=there"],
        ["delete", "demo"],
        ["list"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_dry_run_runs_nothing_and_what_it_prints_is_a_script(
    cloud, capsys, argv, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    assert _call(cloud, *argv, "--dry-run") == 0
    assert cloud.calls() == []
    assert not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    lines = [shlex.split(line) for line in printed.splitlines()]
    script = "\n".join(line for line in printed.splitlines() if " -m launch.code " not in line)
    subprocess.run(["bash", "-e"], input=script, text=True, check=True)
    assert cloud.calls() == [line for line in lines if line[0] == "gcloud"]
    assert len(cloud.calls()) > 0


def test_what_is_run_is_what_the_dry_run_prints(cloud, capsys):
    argv = ["run", "demo", *RUN, "--config.train.seed=3"]
    assert _call(cloud, *argv, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert _call(cloud, *argv) == 0
    assert capsys.readouterr().out == dry
    assert [shlex.split(line) for line in dry.splitlines() if line.startswith("gcloud")] == (
        cloud.calls()
    )


def test_a_missing_program_is_said_with_where_to_get_it(cloud, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert _call(cloud, "list") == 2
    assert "https://cloud.google.com/sdk/docs/install" in capsys.readouterr().err


def test_a_config_outside_of_the_repository_is_refused(cloud, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text((code.ROOT / "configs" / "llama_7b.py").read_text())
    assert _call(cloud, "run", "demo", f"--config={path}", RUN[1]) == 2
    assert "which is what is shipped; copy it" in capsys.readouterr().err
    assert cloud.calls() == []


def test_odd_values_reach_the_machines_as_they_are(cloud, tmp_path):
    odd = "quote ' and \" and \\ and $(touch here) and `touch there`"
    assert _call(cloud, "run", "demo", *RUN, f"--env=A={odd}") == 0
    started = (
        _flags(cloud.calls()[-1])["command"].partition("; env ")[2].partition(" bash launch")[0]
    )
    done = subprocess.run(["bash", "-c", f"env {started} env"], cwd=tmp_path, capture_output=True)
    assert f"A={odd}\n" in done.stdout.decode()
    assert not list(tmp_path.glob("*here"))
