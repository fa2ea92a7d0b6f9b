"""Graphs, holes and rows of tasks: what is scored is what was said."""

import ast
import dataclasses
import json
import pathlib
import shlex
import sysconfig

import pytest

from experiments.tasks import complete
from experiments.tasks import graph
from experiments.tasks import report
from experiments.tasks import run
from experiments.tasks import suite
from experiments.tasks import syntax
from experiments.tasks.data import dialogue
from experiments.tasks.data import marked
from experiments.tasks.data import python_code
from llm_jax import errors
from llm_jax.evaluation import files

# --- graphs ----------------------------------------------------------------------------------------

WORDS = ["a", "red", "moth", "is", "an", "insect"]


def test_tags_are_entities():
    labels = ["O", "B-noun", "I-noun", "O", "B-verb", "B-verb"]
    assert graph.entities_of(labels) == {(1, 3): "noun", (4, 5): "verb", (5, 6): "verb"}
    # What goes on without a beginning, or under another name, begins there.
    assert graph.entities_of(["I-noun", "I-verb", "O"]) == {(0, 1): "noun", (1, 2): "verb"}


@pytest.mark.parametrize("head", [(1, 3), (5, 6)])
@pytest.mark.parametrize("name", ["kind_of", "none", "opposite_of"])
def test_labels_of_marked_pairs_are_triples(head, name):
    tail = {(1, 3): (5, 6), (5, 6): (1, 3)}[head]
    first, second, label = marked.label(head, name, tail)
    assert marked.text(WORDS, first, second) == "a @ red moth @ is an # insect #"
    back = marked.triple(first, label, second)
    is_symmetric = name in ("none", "opposite_of")
    assert back == ((first, name, second) if is_symmetric else (head, name, tail))


def test_neighbours_are_marked_apart():
    assert marked.text(["x", "y"], (0, 1), (1, 2)) == "@ x @ # y #"


def _sentence(entities, triples):
    return graph.Sentence(tuple(WORDS), entities, triples)


def test_scores_count_whole_triples():
    row = {
        "words": WORDS,
        "labels": ["O", "B-noun", "I-noun", "O", "O", "B-noun"],
        "relations": [[[1, 3], "kind_of", [5, 6]]],
    }
    both = {(1, 3): "noun", (5, 6): "noun"}
    right = _sentence(both, (((1, 3), "kind_of", (5, 6)),))
    reversed_ = _sentence(both, (((5, 6), "kind_of", (1, 3)),))
    short = _sentence({(2, 3): "noun", (5, 6): "noun"}, (((2, 3), "kind_of", (5, 6)),))
    values = {
        name: {key: one["value"] for key, one in graph.score([found], [row]).items()}
        for name, found in (("right", right), ("reversed", reversed_), ("short", short))
    }
    assert set(values["right"].values()) == {1.0}
    assert values["reversed"]["triples/f1"] == 0.0 and values["reversed"]["entities/f1"] == 1.0
    assert values["short"]["triples/precision"] == 0.0 and values["short"]["entities/f1"] == 0.5
    # Of two right entities that nobody has judged nothing is known.
    unjudged = row | {"relations": []}
    assert graph.score([right], [unjudged])["triples/precision"]["value"] == 0.0
    both_rows = graph.score([right, right], [row, unjudged])
    assert both_rows["triples/precision"]["value"] == 1.0


def test_a_graph_has_a_node_for_each_text():
    both = {(1, 3): "noun", (5, 6): "noun"}
    sentence = _sentence(both, (((1, 3), "kind_of", (5, 6)),))
    made = json.loads(json.dumps(graph.to_json_ld([sentence, sentence])))
    nodes = {node["label"]: node for node in made["@graph"]}
    assert set(nodes) == {"red moth", "insect"}
    assert nodes["red moth"]["kind_of"] == [{"@id": nodes["insect"]["@id"]}]
    assert made["@context"]["label"].endswith("#label")


# --- holes -----------------------------------------------------------------------------------------


def test_holes_are_put_back_where_they_were_cut():
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = (library / "textwrap.py").read_text()
    files = [{"text": text, "module": "textwrap", "path": "textwrap.py"}]
    holes = python_code.holes_of(files, "seed")
    said = [hole["middle"] for hole in holes]
    found = syntax.score(holes, said, library)
    assert found["syntax"]["value"] == found["exact_match"]["value"] == 1.0
    assert syntax.score(holes, ["\0"] * len(holes), library)["syntax"]["value"] == 0.0
    with pytest.raises(errors.UserError, match="is not the file"):
        syntax.score([holes[0] | {"start": 1, "end": 2}], [""], library)


def test_a_text_without_an_end_of_line_is_given_one():
    assert syntax.filled("a\nb\nc\n", 1, 2, "x") == "a\nx\nc\n"
    assert ast.parse(syntax.filled("if a:\n  b\nc\n", 1, 2, "  d\n"))


# --- conversations ---------------------------------------------------------------------------------


def test_conversations_ask_what_only_they_tell():
    row = {"term": "moth", "answer": "an insect", "question": "What is moth?"}
    messages = dialogue.of_definition(row)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert "moth" in messages[0]["content"] and "moth" not in messages[2]["content"]
    assert messages[1]["content"] == "an insect" and messages[3]["content"] == "moth"
    assert dialogue.of_definition(row) == dialogue.of_definition(row)


# --- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Returns a runner of a task whose stages are small programs, and its file of stages."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    (tmp_path / "x-baseline.json").write_text(json.dumps({"scores": {"f1": {"value": 0.1}}}))
    (tmp_path / "first.py").write_text(
        "import pathlib, sys\n"
        "pathlib.Path('count').open('a').write('x')\n"
        "sys.exit(3 if len(pathlib.Path('count').read_text()) == 1 else 0)\n"
    )
    (tmp_path / "last.py").write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1].partition('=')[2]) / 'evaluation' / '5'\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "rows = [{'q': f'{i}', 'target': i, 'prediction': 'x' * 300} for i in range(8)]\n"
        "(folder / 'said.jsonl').write_text('\\n'.join(map(json.dumps, rows)))\n"
        "print('noise')\n"
        "print(json.dumps({'examples': 8, 'scores': {'f1': {'value': 0.5, 'low': 0.4, 'high': 0.6}}}))\n"
    )
    commands = {"train": "first", "evaluate": "last --workdir=runs/x"}
    baselines = (("a rule", "x-baseline", "f1"), ("itself", "stage evaluate", "f1"))
    task = suite.Task("x", (), (), commands, ("f1",), baselines, suite.Outputs("said.jsonl", "q"))
    return run.Runner("x", task, tmp_path / "elsewhere"), tmp_path


def test_what_fails_is_told_and_what_was_done_is_kept(runner):
    runs, folder = runner
    with pytest.raises(errors.UserError, match="train ended with code 3"):
        runs.run()
    row = runs.run()
    assert row["scores"]["f1"]["value"] == 0.5 and row["examples"] == 8
    assert [one["score"]["value"] for one in row["baselines"]] == [0.1, 0.5]
    assert [output["given"] for output in row["outputs"]] == ["2", "4", "6"]
    assert row["outputs"][0]["said"].endswith("x…") and len(row["outputs"][0]["said"]) == 241
    seconds = row["seconds"]["train"]
    assert (folder / "count").read_text() == "xx"
    assert runs.run()["seconds"]["train"] == seconds  # nothing ran again
    assert (folder / "count").read_text() == "xx"


def test_runs_lie_where_they_are_told_to_and_rows_do_not_say_where(runner):
    runs, folder = runner
    elsewhere = f"{folder}/elsewhere"
    argv = runs._argv("m runs/x --config=f.py:runs/x --after=runs/a,runs/b 'jsonl:~/runs/c'")
    assert argv == [
        "m",
        f"{elsewhere}/x",
        f"--config=f.py:{elsewhere}/x",
        f"--after={elsewhere}/a,{elsewhere}/b",
        "jsonl:~/runs/c",
    ]
    with pytest.raises(errors.UserError):
        runs.run()
    runs.run()
    said = json.dumps({"score": "loss", "runs": {f"{elsewhere}/a": {}}, "examples": 1})
    assert runs._row(said)["found"]["runs"] == {"runs/a": {}}


def test_training_that_was_stopped_is_not_done(runner, monkeypatch):
    runs, folder = runner
    line = "llm_jax.train --workdir=runs/x"
    monkeypatch.setattr(run.metrics, "steps_left", lambda workdir: 7)
    monkeypatch.setattr(runs, "_argv", lambda line: ["first", "--workdir=x"])
    (folder / "count").write_text("x")  # the program ends well from now on
    with pytest.raises(errors.UserError, match="ended with code 15"):
        runs._stage("train", line)
    monkeypatch.setattr(run.metrics, "steps_left", lambda workdir: 0)
    runs._stage("train", line)
    assert runs._stages()["train"]["is_done"]


def test_rows_of_the_table_say_what_results_say(runner):
    runs, _ = runner
    with pytest.raises(errors.UserError):
        runs.run()
    table = report.rows({"x": runs.run()})
    assert "0.500 [0.400, 0.600]" in table and "a rule 0.100" in table


def test_what_is_forgotten_is_in_the_table_too(runner):
    runs, _ = runner
    with pytest.raises(errors.UserError):
        runs.run()
    scored = {"step": 1, "scores": {"loss": {"value": 2.5, "low": 2.0, "high": 3.0}}}
    found = {"score": "loss", "runs": {name: {"old": scored, "new": scored} for name in "ab"}}
    table = report.rows({"x": runs.run() | {"found": found}})
    cell = "loss on the old 2.500 [2.000, 3.000], loss on the new 2.500 [2.000, 3.000]"
    assert f"| {cell} | a: {cell} |" in table


def test_conversations_and_answers_are_shown_as_texts():
    said = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "this"}]
    assert run._cut(said) == "which? / this" and run._cut(["a", "b"]) == "a / b"
    assert run._cut(-1.5) == "-1.5"


def test_what_is_continued_is_told_by_its_end(runner):
    runs, _ = runner
    outputs = dataclasses.replace(runs._task.outputs, is_continued=True)
    runs._task = dataclasses.replace(runs._task, outputs=outputs)
    assert runs._given({"q": "a" * 300 + "the end"}, 0) == "…" + "a" * 233 + "the end"
    assert runs._given({"q": "short"}, 0) == "short"


def test_files_are_given_by_their_first_lines():
    assert complete.halves("a\nb\n\nc\n", 2) == ("a\nb\n", "\nc\n")
    assert complete.halves("a\nb\n\n", 2) is None  # nothing is left to say
    rows = [
        {"prediction": "\n  return x\n  y", "target": "  return x\n\ndef f"},
        {"prediction": "return z", "target": "return x"},
    ]
    found = complete.score(rows)
    assert found["first_line"]["value"] == 0.5
    assert 0 < found["chrf"]["value"] < 100


def test_all_tasks_name_configs_and_data_that_there_are():
    from experiments.tasks.data import __main__ as data

    for name, task in suite.TASKS.items():
        for one in task.data:
            assert one.partition(":")[0] in {*data.DATA_SETS, "translation"}
        for line in task.commands.values():
            for part in line.split():
                if part.startswith("--config="):
                    path = part.removeprefix("--config=").partition(":")[0]
                    assert (run.ROOT / path).is_file(), (name, path)


@pytest.mark.parametrize("name", [name for name, task in suite.TASKS.items() if task.outputs])
def test_outputs_are_those_of_what_was_scored(name):
    shown = suite.TASKS[name].outputs
    written = {f"{complete.NAME}.jsonl"}
    for line in suite.TASKS[name].commands.values():
        flags = dict(part.partition("=")[::2] for part in shlex.split(line))
        if flags.get("--workdir") != f"runs/{shown.run or name}":
            continue
        task, source = flags.get("--tasks", "search"), flags.get("--source", "")
        source = source or "jsonl:" + flags.get("--pairs", "")
        written.add(f"{task}-{files.name_of(source)}.jsonl")
    assert shown.file in written
