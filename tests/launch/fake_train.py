"""A training that saves empty checkpoints, or does what `behaviour` in its workdir says.

"wait": after a few steps it waits for a signal. "hang": it heeds none. "crash", "refuse": it ends.
"""

import json
import os
import pathlib
import signal
import sys
import time

NUM_STEPS = 20

flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
behaviour = workdir / "behaviour"
kind = behaviour.read_text().strip() if behaviour.exists() else "train"
is_told = []
signal.signal(signal.SIGTERM, lambda *_: is_told.append(True))
if kind == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if kind == "refuse":
    print("error: config.model.num_heads = 7 will not do")
    sys.exit(2)

(workdir / "checkpoints").mkdir(exist_ok=True)
(workdir / "config.json").write_text(json.dumps({"train": {"num_steps": NUM_STEPS}}))
(workdir / "environment.json").write_text(json.dumps(dict(os.environ)))
first = max((int(path.name) for path in (workdir / "checkpoints").iterdir()), default=0)
print(f"training from step {first}", flush=True)
for step in range(first + 1, NUM_STEPS + 1):
    time.sleep(1000 if kind == "hang" else 0.01)
    while kind == "wait" and step > first + 4 and not is_told:
        time.sleep(0.02)
    if kind == "crash" and step > first + 2:
        os.abort()
    (workdir / "checkpoints" / str(step)).mkdir()
    if is_told:
        break
