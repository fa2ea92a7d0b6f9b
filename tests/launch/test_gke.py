"""What xpk is called with; the flags were checked against the parser of xpk 1.16.0."""

import shlex

import pytest

from launch import gke
from tests.launch import conftest

PLACE = ["--project=my-project", "--zone=us-west4-a"]
RUN = ["--cluster=mine", "--config=configs/llama_7b.py", "--workdir=gs://my-bucket/llama"]


def _call(cloud, *argv):
    return gke.main([*argv, *PLACE], cloud.shell())


def _xpk(cloud):
    return [call for call in cloud.calls() if call[0] == "xpk"]


def test_a_cluster_is_made_for_a_slice(cloud, capsys):
    assert _call(cloud, "cluster_create", "mine", "--slice=2*v5e:4x4", "--spot") == 0
    place = ["--cluster=mine", *PLACE]
    chips = ["--tpu-type=v5litepod-16", "--num-slices=2"]
    assert _xpk(cloud) == [["xpk", "cluster", "create", *place, *chips, "--spot"]]
    assert "32 chips x $1.20" in capsys.readouterr().err
    assert _call(cloud, "cluster_create", "mine", "--slice=v5e:4x4", "--reservation=r") == 0
    assert _xpk(cloud)[-1][-1] == "--reservation=r"
    assert _call(cloud, "cluster_create", "mine", "--slice=v5e:4x4") == 0
    assert _xpk(cloud)[-1][-1] == "--on-demand"


def test_a_run_has_the_command_of_the_tpu_vms(cloud):
    override = "--config.train.seed=3"
    assert _call(cloud, "run", "demo", *RUN, override, "--env=A=b c", "--before=echo hello") == 0
    (call,) = _xpk(cloud)
    flags = dict(word[2:].partition("=")[::2] for word in call[3:])
    assert call[:3] == ["xpk", "workload", "create"]
    assert (flags["workload"], flags["cluster"]) == ("demo", "mine")
    assert (flags["tpu-type"], flags["num-slices"]) == ("v5litepod-32", "1")
    assert flags["restart-on-exit-codes"] == "1"  # and never 2: a wrong config stays wrong
    assert int(flags["max-restarts"]) > 0
    before, _, command = flags["command"].partition(" && exec ")
    assert before == "echo hello"
    words = shlex.split(command)
    assert words[-2:] == ["--config=configs/llama_7b.py", override]
    assert "A=b c" in words
    assert words[words.index("bash") :][:5] == [
        *("bash", "launch/worker.sh", "foreground", "demo"),
        "--workdir=gs://my-bucket/llama",
    ]
    assert any(word.startswith("LIBTPU_INIT_ARGS=--xla") for word in words)


def test_what_is_put_into_the_image_is_what_git_tracks(cloud, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    copy = f"cp -r {tmp_path}/llm_jax-*/ {kept}"
    cloud.rule("workload create", {"after": copy})
    assert _call(cloud, "run", "demo", *RUN) == 0
    assert (kept / "launch" / "worker.sh").is_file()
    assert (kept / "llm_jax" / "train.py").exists()
    assert not list(kept.rglob("__pycache__"))
    assert not list(tmp_path.glob("llm_jax-*/"))


def test_listing_logs_and_deleting(cloud):
    assert _call(cloud, "list", "--cluster=mine") == 0
    assert _xpk(cloud)[-1] == ["xpk", "workload", "list", "--cluster=mine", *PLACE]
    assert _call(cloud, "logs", "demo", "--cluster=mine", "--worker=2") == 0
    assert 'pod_name:"demo-slice-job-0-2-"' in cloud.calls()[-1][3]
    assert _call(cloud, "delete", "demo", "--cluster=mine") == 2  # there is nobody to ask
    assert _call(cloud, "cluster_delete", "mine") == 2
    assert len(_xpk(cloud)) == 1
    assert _call(cloud, "delete", "demo", "--cluster=mine", "--yes") == 0
    assert _xpk(cloud)[-1][1:3] == ["workload", "delete"]
    assert "--workload=demo" in _xpk(cloud)[-1]  # without it xpk deletes all of them
    assert _call(cloud, "cluster_delete", "mine", "--yes") == 0
    assert _xpk(cloud)[-1][1:3] == ["cluster", "delete"]


def test_tpu7x_is_named_by_its_shape(cloud):
    argv = ["cluster_create", "mine", "--slice=tpu7x:2x2x2", "--project=my-project"]
    assert gke.main([*argv, "--zone=us-central1-c"], cloud.shell()) == 0
    assert "--tpu-type=tpu7x-2x2x2" in _xpk(cloud)[-1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["cluster_create", "mine"], "--slice is missing"),
        (["cluster_create", "mine", "--slice=v5e:2x2"], "xpk has no v5litepod-4"),
        (["run", "demo", *RUN, "--secret=A=b"], "--secret needs gcloud in the container"),
        (["run", "demo", *RUN, "--env=A=b\nc"], "of one line"),
        (["run", "demo", "--cluster=Mine", *RUN[1:]], "'Mine' will not do as a name"),
        (["run", "demo", *RUN[:2], "--workdir=here"], "gs://BUCKET/PATH"),
        (["run", "demo", *RUN, "--config.model.num_heads=7"], "num_heads"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_run(cloud, capsys, argv, said):
    assert _call(cloud, *argv) == 2
    assert said in capsys.readouterr().err
    assert cloud.calls() == []


@pytest.mark.parametrize(
    "argv",
    [
        ["cluster_create", "mine", "--slice=v5e:4x4"],
        ["cluster_delete", "mine"],
        ["run", "demo", *RUN],
        ["delete", "demo", "--cluster=mine"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_dry_run_runs_nothing(cloud, capsys, argv, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    assert _call(cloud, *argv, "--dry-run") == 0
    assert cloud.calls() == []
    assert not (tmp_path / "none").exists()
    assert any(line.startswith("xpk ") for line in capsys.readouterr().out.splitlines())


def test_a_run_is_not_made_if_the_bucket_is_missing(cloud, capsys):
    cloud.rule("buckets describe", conftest.NO_FILES)
    assert _call(cloud, "run", "demo", *RUN) == 2
    assert "there is no bucket gs://my-bucket" in capsys.readouterr().err
    assert _xpk(cloud) == []
