"""Writes what the `hf` backend of lm-evaluation-harness makes of SmolLM2 135M, to `answers.json`:

    python -m tests.golden.lm_eval.make

with torch, transformers and `lm-eval[hf]`, from the root of the repository. The model is that of a package, by
way of our own converter; requests are those of the tasks beside this file, with a short context of 128 tokens.
"""

import json
import pathlib
import tempfile

import lm_eval
from lm_eval import tasks
from lm_eval.models import huggingface
import torch
import transformers

from tests.convert import folders
from tests.golden.lm_eval import answers


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        temporary = pathlib.Path(temporary)
        folder = folders.export(answers.import_model(temporary), temporary / "hf", dtype="float32")
        model = huggingface.HFLM(
            str(folder),
            device="cpu",
            dtype="float32",
            batch_size=4,
            max_length=answers.MAX_LENGTH,
        )
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(answers.TASKS),
            task_manager=tasks.TaskManager(
                include_path=str(answers.FOLDER), include_defaults=False
            ),
        )
        conversations = [model.apply_chat_template(*case) for case in answers.CONVERSATIONS]
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    kept = {"versions": {"lm_eval": results["lm_eval_version"]} | versions}
    kept |= {"tasks": answers.of(results), "conversations": conversations}
    path = answers.FOLDER.parent / "answers.json"
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
