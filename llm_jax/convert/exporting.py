"""From a workdir to a folder that Hugging Face loads."""

from collections.abc import Callable
import dataclasses
import json
import logging
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.convert import engine
from llm_jax.convert import families
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert import tensors as tensors_lib
from llm_jax.convert import tokenizer_files
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build

_LOG = logging.getLogger(__name__)

_METADATA = {
    "format": "pt"
}  # transformers refuses files that do not say which framework's they are
DTYPES = ("float32", "bfloat16", "float16")
_DTYPE_KEYS = ("dtype", "torch_dtype")

ReadParam = Callable[[str], jax.Array]  # a parameter by its path


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of a user.

    Attributes:
      family: whose model to write; None: the one it came from, or the only one that can be it.
      dtype: of the tensors; None: as they came, or as the checkpoint has them.
      max_shard_bytes: of a file.
    """

    family: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9


def export_model(
    workdir: str, folder: pathlib.Path, step: int | str | None, options: Options
) -> str:
    """Writes a checkpoint as a model's folder; returns a line that says what was done.

    Raises:
      errors.UserError: there is no such checkpoint, the folder is a file or not empty, or the family has
        no such model.
    """
    check_new(folder)
    mesh, rules = one_device()

    def read(step_dir: epath.Path, meta: checkpoint.Meta) -> str:
        if meta.config.model.lora.is_on:
            raise errors.UserError(
                f"{step_dir} has low-rank updates beside its matrices: add them up by python -m"
                " llm_jax.convert merge, or write them alone by to-peft"
            )
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(meta.config.model, rules)
        family = family_of(meta, meta.config.model, abstract, options.family)
        export = Export(meta, family, abstract, options)
        read_param = checkpoint.params_reader(step_dir, meta, abstract)
        write_whole(folder, lambda temporary: export.write(temporary, read_param))
        return f"{step_dir}, as {family.model_type} in {export.dtype}, is {folder}"

    return checkpoint.read_latest(workdir, step, read)


def check_new(folder: pathlib.Path) -> None:
    """Checks that a folder is none yet, or empty; raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise errors.UserError(f"{folder} is a file: name a folder that is to be made")
    if folder.exists() and any(folder.iterdir()):
        raise errors.UserError(f"{folder} is not empty: use another folder")


def one_device() -> tuple[jax.sharding.Mesh, sharding.AxisRules]:
    """Returns a mesh of one device, and rules by which parameters lie on it whole."""
    mesh_config = config_lib.MeshConfig(rules="fsdp")
    return mesh_lib.make(mesh_config, jax.devices()[:1]), sharding.axis_rules(mesh_config)


def write_whole(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Writes beside the folder, which gets its name when all is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)  # mkdtemp's is the owner's alone
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def family_of(
    meta: checkpoint.Meta, model: config_lib.ModelConfig, abstract: Any, asked: str | None
) -> table.Family:
    """Returns the family to write of an abstract model; UserError if it is not clear which."""
    if asked is None and meta.source is not None:
        asked = meta.source["family"]
    if asked is not None:
        if asked not in families.BY_TYPE:
            hint = errors.nearest(asked, families.BY_TYPE)
            raise errors.UserError(
                f"--family={asked} is not known{hint}: use one of {', '.join(families.BY_TYPE)}"
            )
        return families.BY_TYPE[asked]
    fitting = []
    for family in families.BY_TYPE.values():
        try:
            names = engine.Plan(family, model, abstract).slots
            settings.to_theirs(family.settings, model, {}, names, family.model_type)
        except errors.UserError:
            continue
        fitting.append(family)
    if len(fitting) == 1:
        return fitting[0]
    which = ", ".join(family.model_type for family in fitting)
    raise errors.UserError(
        f"the model can be any of {which}: say which by --family"
        if fitting
        else "no family that llm_jax converts has such a model; --family=NAME says what it lacks"
    )


class Export:
    """A model on its way out: its files decided, its tensors not read."""

    def __init__(
        self, meta: checkpoint.Meta, family: table.Family, abstract: Any, options: Options
    ):
        """Args: of the checkpoint, the family to write, the abstract model, the choices.

        Raises:
          errors.UserError: the family has no such model.
        """
        source = meta.source if meta.source and meta.source["family"] == family.model_type else {}
        self._source, self._family, self._options = source, family, options
        self._model_config, self._labels = meta.config.model, meta.labels
        self._tokenizer = tokenizer_lib.from_dict(meta.tokenizer)
        self._chat = meta.chat
        self._plan = engine.Plan(family, meta.config.model, abstract)
        self._naming = engine.Naming(**source.get("naming", {}))
        self._extras = {
            name: origin
            for name, origin in self._plan.extras().items()
            if name in source.get("extras", ())
        }
        self.dtype = options.dtype or source.get("dtype") or meta.config.model.param_dtype
        self.config = self._config()

    def _config(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        original = dict(self._source.get("config", {}))
        theirs = settings.to_theirs(
            self._family.settings,
            self._model_config,
            original,
            self._plan.slots,
            self._family.model_type,
        )
        if not original:
            theirs = {"model_type": self._family.model_type} | theirs
            theirs |= tokenizer_files.special_ids(self._tokenizer)
        if self._labels is not None:
            theirs |= settings.of_labels(self._labels)
        keys = [key for key in _DTYPE_KEYS if key in theirs]
        if not original or (keys and self._options.dtype is not None):
            theirs |= dict.fromkeys(keys or ["torch_dtype"], self.dtype)
        return theirs

    def _dtype_of(self, name: str) -> np.dtype:
        is_constant = isinstance(self._extras.get(name), table.Constant)
        if self._options.dtype is not None and not is_constant:
            return tensors_lib.dtype_of(self.dtype)
        usual = self._source.get("dtype", self.dtype)
        return tensors_lib.dtype_of(self._source.get("dtypes", {}).get(name, usual))

    def _infos(self) -> dict[str, tensors_lib.TensorInfo]:
        """Returns what is to be written, by canonical names, the widest numbers first."""
        infos = {name: slot.info for name, slot in self._plan.slots.items()}
        infos |= {
            name: infos[origin]
            if isinstance(origin, str)
            else tensors_lib.TensorInfo(origin.make(self._model_config).shape, np.dtype(bool))
            for name, origin in self._extras.items()
        }
        infos = {
            name: dataclasses.replace(info, dtype=self._dtype_of(name))
            for name, info in infos.items()
        }
        # As the library has them, so that each is aligned.
        order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
        return {name: infos[name] for name in order}

    def write(self, folder: pathlib.Path, read: ReadParam) -> None:
        """Writes all files into an empty folder, of one tensor's parameters after the other's."""
        infos = self._infos()
        spelled = {name: self._naming.spelled(name, self._family) for name in infos}
        writer = tensors_lib.Writer(
            folder,
            {spelled[name]: info for name, info in infos.items()},
            self._source.get("metadata") or _METADATA,
            self._options.max_shard_bytes,
        )

        def put(name: str, array: np.ndarray) -> None:
            writer.put(spelled[name], array.astype(infos[name].dtype, copy=False))

        for row, names in self._plan.by_row().items():
            params = {part.path: read(part.path) for part in row.parts}
            for name in names:
                array = engine.theirs(self._plan, name, params)
                put(name, array)
                for alias in [n for n, origin in self._extras.items() if origin == name]:
                    put(alias, array)
        for name, origin in self._extras.items():
            if isinstance(origin, table.Constant):
                put(name, origin.make(self._model_config))
        writer.close()
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tokenizer_files.write(folder, self._source.get("files", {}), self._tokenizer, self._chat)
