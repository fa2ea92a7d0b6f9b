"""Stands in for `gcloud` and `xpk`: notes what it is called with, and answers as a test has written.

$STAND_IN is a folder. calls.jsonl grows by a line for each call. rules.json lists [pattern, answers]:
the first rule whose pattern is found in the command gives its next answer, the last one for ever.
An answer is a dict of stdout, stderr, code and after (a line of shell that is run first). Without a
rule: commands on files work on the paths they name, `ssh` runs its command in machine/ as home.
"""

import json
import os
import sys

FOLDER = os.environ["STAND_IN"]


def _play(answer):
    if answer.get("after") and os.system(answer["after"]):
        raise RuntimeError(f"failed: {answer['after']}")
    sys.stdout.write(answer.get("stdout", ""))
    sys.stderr.write(answer.get("stderr", ""))
    return answer.get("code", 0)


def _next(rules, index):
    answers = rules[index][1]
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    with open(f"{FOLDER}/rules.json", "w") as file:
        json.dump(rules, file)
    return answer


def _missing(what):
    sys.stderr.write(f"ERROR: (gcloud) The following URLs matched no objects or files: {what}\n")
    return 1


def _storage(verb, words):
    import pathlib
    import shutil

    paths = [pathlib.Path(word) for word in words if not word.startswith("--")]
    if verb == "cp":
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(*paths)
    elif verb == "rm":
        if not paths[0].exists():
            return _missing(paths[0])
        shutil.rmtree(paths[0])
    elif verb == "cat":
        found = list(paths[0].parent.glob(paths[0].name))
        if not found:
            return _missing(paths[0])
        for path in found:
            sys.stdout.buffer.write(path.read_bytes())
    elif verb == "ls":
        if not paths[0].is_dir():
            return _missing(paths[0])
        for path in paths[0].iterdir():
            print(f"{path}/" if path.is_dir() else path)
    return 0


def _ssh(words):
    import subprocess

    (line,) = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    home = f"{FOLDER}/machine"
    os.makedirs(home, exist_ok=True)
    return subprocess.run(
        ["bash", "-c", line], cwd=home, env=os.environ | {"HOME": home}
    ).returncode


def main():
    command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    with open(f"{FOLDER}/calls.jsonl", "a") as calls:
        calls.write(json.dumps(command) + "\n")
    with open(f"{FOLDER}/rules.json") as file:
        rules = json.load(file)
    line = " ".join(command)
    for index, (pattern, _) in enumerate(rules):
        if pattern in line:
            return _play(_next(rules, index))
    if os.path.exists(f"{FOLDER}/has_files"):
        if command[1] == "storage":
            return _storage(command[2], command[3:])
        if "ssh" in command:
            return _ssh(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
