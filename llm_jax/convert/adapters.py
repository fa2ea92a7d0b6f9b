"""Low-rank updates on their way out: merged into their matrices, or alone in PEFT's format.

PEFT (peft 0.21) keeps of each linear module `lora_A`, [rank, inputs], and `lora_B`, [outputs, rank]. Where a
family joins several of our matrices in one (GPT-2's c_attn) their updates become one of the sum of their
ranks, with zeros where one has no part.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import errors
from llm_jax import trees
from llm_jax import tuning
from llm_jax.convert import engine
from llm_jax.convert import exporting
from llm_jax.convert import table
from llm_jax.convert import tensors as tensors_lib
from llm_jax.data import chat
from llm_jax.models import build
from llm_jax.models import lora

_TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "none": "FEATURE_EXTRACTION",
}
_PREFIX = "base_model.model."


def merge(workdir: str, target: str, step: int | str | None) -> str:
    """Writes a checkpoint with its updates added to their matrices; returns a line on it.

    Raises:
      errors.UserError: there is no such checkpoint, it has no updates, or the target has checkpoints.
    """
    checkpoint.check_new(target)
    mesh, rules = exporting.one_device()

    def read(step_dir: epath.Path, meta: checkpoint.Meta) -> str:
        model = _updated(step_dir, meta)
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(model, rules)
            params = checkpoint.restore_params(step_dir, meta, abstract, mesh)
            merged = lora.merge(params, model, rules)
        template = chat.of_checkpoint(meta)
        # A start would be looked for again, by runs that take this config.
        config = dataclasses.replace(
            meta.config, model=lora.without(model), tune=config_lib.TuneConfig()
        )
        checkpoint.save_params(
            target,
            config,
            meta.tokenizer,
            trees.to_nested(merged),
            labels=meta.labels,
            chat=None if template is None else template.to_dict(),
        )
        return f"{step_dir}, its updates of rank {model.lora.rank} merged, is {target}"

    return checkpoint.read_latest(workdir, step, read)


def _updated(step_dir: epath.Path, meta: checkpoint.Meta) -> config_lib.ModelConfig:
    if not meta.config.model.lora.is_on:
        raise errors.UserError(f"{step_dir} has no low-rank updates (model.lora.rank = 0)")
    return meta.config.model


def export_adapter(
    workdir: str, folder: pathlib.Path, step: int | str | None, family: str | None
) -> str:
    """Writes a checkpoint's updates, and heads that learned beside them, as PEFT loads them.

    Args:
      workdir: of the run.
      folder: to write.
      step: of the checkpoint.
      family: whose names tensors get; None: the only one that can be it.

    Raises:
      errors.UserError: there is no such checkpoint, it has no updates, something else learned beside
        them, the folder is not empty, or the family joins what PEFT has no update of.
    """
    exporting.check_new(folder)
    mesh, rules = exporting.one_device()

    def read(step_dir: epath.Path, meta: checkpoint.Meta) -> str:
        model = _updated(step_dir, meta)
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(model, rules)
            plain = build.abstract_model(lora.without(model), rules)
        found = exporting.family_of(meta, lora.without(model), plain, family)
        plan = engine.Plan(found, lora.without(model), plain)
        read_param = checkpoint.params_reader(step_dir, meta, abstract)
        adapter = Adapter(meta, plan, list(trees.by_name(abstract)))
        exporting.write_whole(folder, lambda temporary: adapter.write(temporary, read_param))
        return f"{step_dir}, its updates for {found.model_type}, is {folder}"

    return checkpoint.read_latest(workdir, step, read)


class Adapter:
    """Updates on their way to PEFT's two files."""

    def __init__(self, meta: checkpoint.Meta, plan: engine.Plan, names: list[str]):
        """Args: of the checkpoint, the tensors of the family, all parameters of ours.

        Raises:
          errors.UserError: what learned has no place in PEFT's format.
        """
        self._meta, self._plan, self._model = meta, plan, meta.config.model
        self._naming = engine.Naming(has_base=self._model.head != "none")
        self._updated = {
            base for base in plan.params if any(path in names for path in _update_paths(base)[:1])
        }
        learned = [name for name in names if tuning.is_learned(meta.config, name)]
        self._whole = sorted(name for name in learned if f"/{lora.LORA}/" not in name)
        strange = [name for name in self._whole if "/stack/" in f"/{name}"]
        if strange:
            raise errors.UserError(
                f"{', '.join(strange[:3])} learned beside the updates, which PEFT has no place for:"
                " merge them, and write the whole model by to-hf"
            )

    def write(self, folder: pathlib.Path, read: exporting.ReadParam) -> None:
        """Writes both files into an empty folder."""
        tensors, ranks, modules = self._updates(read)
        heads, saved = self._heads(read)
        tensors |= heads
        infos = {
            name: tensors_lib.TensorInfo(array.shape, array.dtype)
            for name, array in sorted(tensors.items())
        }
        writer = tensors_lib.Writer(folder, infos, {"format": "pt"}, 5 * 10**9, "adapter_model")
        for name in infos:
            writer.put(name, tensors[name])
        writer.close()
        config = self._config(ranks, modules, saved)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def _updates(
        self, read: exporting.ReadParam
    ) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str]]:
        """Returns PEFT's tensors by name, the rank of each module, and its short name."""
        tensors, ranks, modules = {}, {}, {}
        for row, names in self._plan.by_row().items():
            parts = [part for part in row.parts if part.path in self._updated]
            if not parts:
                continue
            if row.is_merged:
                raise errors.UserError(
                    f"{row.name} of {self._plan.family.model_type} has heads of several matrices side by"
                    " side, which PEFT has no update of: merge it, and write the model by to-hf"
                )
            values = {
                path: np.asarray(read(path), np.float32)
                for part in parts
                for path in _update_paths(part.path)
            }
            for name in names:
                place = self._plan.slots[name].place
                at = {path: value[place[0]] for path, value in values.items()}
                a, b = self._joined(row, parts, at)
                module = self._naming.spelled(name, self._plan.family).removesuffix(".weight")
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
                ranks[module], modules[module] = a.shape[0], module.rpartition(".")[2]
        return tensors, ranks, modules

    def _joined(
        self, row: table.Row, parts: list[table.Part], values: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns `lora_A` and `lora_B` of a tensor of theirs."""
        downs, ups, first = [], [], 0
        for part in row.parts:
            letters = part.ours
            sizes = dict(zip(letters, self._plan.shape(part), strict=True))
            inputs, outputs = dims.MATRICES[letters] if letters in dims.MATRICES else ("", letters)
            (of_outputs,) = [g for g in part.groups() if set(g) <= set(outputs)]
            num_outputs = int(np.prod([sizes[letter] for letter in of_outputs]))
            if part in parts:
                (of_inputs,) = [g for g in part.groups() if set(g) <= set(inputs)]
                down, up = (values[path] for path in _update_paths(part.path))
                downs.append(_flattened(down, f"{inputs}I", of_inputs).T)
                ups.append((first, _flattened(up, f"I{outputs}", of_outputs)))
            first += num_outputs
        a = np.concatenate(downs)
        b = np.zeros((first, a.shape[0]), np.float32)
        rank = self._model.lora.rank
        for index, (row_start, up) in enumerate(ups):
            b[row_start : row_start + len(up), index * rank : (index + 1) * rank] = up
        return np.ascontiguousarray(a), b

    def _heads(self, read: exporting.ReadParam) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns tensors of parameters that learned whole, and the names of their modules."""
        tensors, modules = {}, set()
        for row, names in self._plan.by_row().items():
            if not any(part.path in self._whole for part in row.parts):
                continue
            params = {part.path: read(part.path) for part in row.parts}
            for name in names:
                spelled = self._naming.spelled(name, self._plan.family)
                array = engine.theirs(self._plan, name, params)
                tensors[_PREFIX + spelled] = np.ascontiguousarray(array)
                modules.add(spelled.rpartition(".")[0])
        return tensors, sorted(modules)

    def _config(
        self, ranks: Mapping[str, int], modules: Mapping[str, str], saved: list[str]
    ) -> dict[str, Any]:
        rank, alpha = self._model.lora.rank, self._model.lora.alpha
        wider = {module: found for module, found in ranks.items() if found != rank}
        is_decoder = self._model.architecture != "encoder_decoder"
        lm = "CAUSAL_LM" if is_decoder else "SEQ_2_SEQ_LM"
        return {
            "peft_type": "LORA",
            "task_type": lm if self._model.head == "lm" else _TASKS[self._model.head],
            "base_model_name_or_path": "",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": wider,
            # Scales are alpha / rank of each.
            "alpha_pattern": {module: alpha * found / rank for module, found in wider.items()},
            "target_modules": self._targets(modules),
            "modules_to_save": saved or None,
            "fan_in_fan_out": self._is_transposed(),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }

    def _targets(self, modules: Mapping[str, str]) -> list[str]:
        """Returns short names of modules if these and no others end with them, else whole ones."""
        short = set(modules.values())
        spelled = (self._naming.spelled(name, self._plan.family) for name in self._plan.slots)
        others = {name.removesuffix(".weight") for name in spelled} - set(modules)
        is_clear = not any(other.rpartition(".")[2] in short for other in others)
        return sorted(short) if is_clear else sorted(modules)

    def _is_transposed(self) -> bool:
        """Returns whether theirs have inputs first, as GPT-2's Conv1D."""
        for row in self._plan.family.rows:
            for part in row.parts:
                if part.path in self._updated:
                    inputs, _ = dims.MATRICES[part.ours]
                    return set(part.groups()[0]) <= set(inputs)
        return False


def _update_paths(base: str) -> list[str]:
    """Returns the names of the two arrays that update a matrix, were it updated."""
    module, _, name = base.rpartition("/")
    short, _, letters = name.rpartition("_")
    if letters not in dims.MATRICES:
        return [f"{module}/{lora.LORA}/"]
    inputs, outputs = dims.MATRICES[letters]
    return [
        f"{module}/{lora.LORA}/{short}_down_{inputs}I",
        f"{module}/{lora.LORA}/{short}_up_I{outputs}",
    ]


def _flattened(array: np.ndarray, letters: str, order: str) -> np.ndarray:
    """Returns [.., rank] of an array whose other dimensions are flattened in an order."""
    moved = array.transpose([letters.index(letter) for letter in f"{order}I"])
    return moved.reshape(-1, moved.shape[-1])
