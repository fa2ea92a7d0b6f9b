"""From Hugging Face (or a GGUF file) to a workdir that `sampling` loads."""

from collections import Counter
from collections.abc import Mapping
import dataclasses
import fnmatch
import logging
import math
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
from llm_jax.convert import equality
from llm_jax.convert import families
from llm_jax.convert import settings
from llm_jax.convert import source as source_lib
from llm_jax.convert import table
from llm_jax.convert import tokenizer_files
from llm_jax.data import token_ids
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build

_LOG = logging.getLogger(__name__)

# Of models with a head of the vocabulary.
_OBJECTIVES = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "seq2seq"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of a user.

    Attributes:
      param_dtype: of the parameters; None: that of the file.
      has_tokenizer: whether to look for one; else texts are ids.
      skipped: patterns of names of tensors that are left out.
    """

    param_dtype: str | None = None
    has_tokenizer: bool = True
    skipped: tuple[str, ...] = ()


def family_of(config: Mapping[str, Any], where: str) -> table.Family:
    """Returns the family of a `config.json`; UserError if it is none of ours."""
    name = config.get("model_type")
    if name not in families.BY_TYPE:
        hint = errors.nearest(str(name), families.BY_TYPE)
        known = ", ".join(families.BY_TYPE)
        raise errors.UserError(f"{where}: model_type = {name!r}{hint}: llm_jax converts {known}")
    return families.BY_TYPE[name]


class Conversion:
    """A model on its way in: its config decided and its tensors checked, but not read."""

    def __init__(
        self,
        source: source_lib.Source,
        options: Options,
        mesh: jax.sharding.Mesh,
        rules: sharding.AxisRules,
    ):
        """Args: the model, the choices, and where the parameters go.

        Raises:
          errors.UserError: a model that llm_jax has not, or tensors that are not its own.
        """
        self._source, self._mesh = source, mesh
        where = str(source.path)
        self.family = family_of(source.config, where)
        self.naming = engine.naming(self.family, source.tensors.infos)
        self._spelled: dict[str, str] = {}
        for name in source.tensors.infos:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.skipped):
                continue
            canonical = self.naming.canonical(name, self.family)
            if canonical in self._spelled:
                raise errors.UserError(
                    f"{where}: {self._spelled[canonical]} and {name} are names of one tensor: --skip one"
                )
            self._spelled[canonical] = name
        self._infos = {name: source.tensors.infos[n] for name, n in self._spelled.items()}
        model = settings.to_ours(
            self.family.settings, source.config, self._spelled, f"{where}/config.json"
        )
        abstract = self._abstract(model, rules)
        dtype = options.param_dtype or self._dtype(engine.Plan(self.family, model, abstract))
        self.model_config = dataclasses.replace(model, param_dtype=dtype)
        self._plan = engine.Plan(
            self.family, self.model_config, self._abstract(self.model_config, rules)
        )
        engine.check(self._plan, self._infos, where)

    def _abstract(self, config: config_lib.ModelConfig, rules: sharding.AxisRules) -> Any:
        with jax.set_mesh(self._mesh):
            return checkpoint.on_mesh(build.abstract_model(config, rules), self._mesh)

    def _dtype(self, plan: engine.Plan) -> str:
        """Returns the dtype that holds all parameters as they are in the file."""
        names = {self._infos[name].dtype.name for name in plan.slots if name in self._infos}
        if "float64" in names:
            raise errors.UserError(
                f"{self._source.path} has float64 tensors, which would be rounded: say so by"
                " --param_dtype=float32"
            )
        return "bfloat16" if names == {"bfloat16"} else "float32"

    def params(self) -> dict[str, Any]:
        """Returns the parameters on their devices, as nested dicts by name; reads all tensors."""
        self._check_extras()
        with jax.set_mesh(self._mesh):
            return engine.fill(self._plan, self._spelled, self._source.tensors)

    def _check_extras(self) -> None:
        """Checks that tensors that follow from others do; UserError names the first that does not."""
        for name, origin in self._plan.extras().items():
            if name not in self._infos:
                continue
            found = self._source.tensors.read(self._spelled[name])
            if isinstance(origin, str):
                expected = self._source.tensors.read(self._spelled[origin])
                is_same = _is_equal(found, expected)
                because = f"its config.json ties it to {origin}"
            elif origin.make is None:
                _LOG.info("%s is left out: nothing reads it", name)
                continue
            else:
                expected = origin.make(self.model_config).astype(found.dtype)
                is_same = _is_equal(found, expected)
                because = "it follows from config.json"
            if not is_same:
                raise errors.UserError(
                    f"{self._source.path}: tensor {name} is not what it should be: {because}"
                )

    def record(self) -> dict[str, Any]:
        """Returns what the checkpoint says of where it came from; export writes all that again."""
        dtypes = {name: self._infos[name].dtype.name for name in self._infos}
        usual = Counter(dtypes[name] for name in self._plan.slots).most_common(1)[0][0]
        extras = self._plan.extras()
        written = [
            n for n in self._infos if isinstance(extras.get(n), str) or _is_made(extras.get(n))
        ]
        return {
            "family": self.family.model_type,
            "path": str(self._source.path),
            "config": dict(self._source.config),
            "files": self._source.files,
            "metadata": dict(self._source.metadata),
            "naming": dataclasses.asdict(self.naming),
            "extras": written,
            "dtype": usual,
            "dtypes": {n: d for n, d in dtypes.items() if d != usual},
        }

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """Returns the tokenizer; one of ids alone if there is no other."""
        vocab_size = self.model_config.vocab_size
        if self._source.tokenizer is not None:
            if self._source.tokenizer.vocab_size > vocab_size:
                _LOG.warning(
                    "%s: the tokenizer has %d tokens and the model %d: texts with the last ones are refused",
                    self._source.path,
                    self._source.tokenizer.vocab_size,
                    vocab_size,
                )
            return self._source.tokenizer

        def known(key: str, otherwise: int) -> int:
            value = self._source.config.get(key)
            return value if isinstance(value, int) and 0 <= value < vocab_size else otherwise

        eos_id, pad_id = known("eos_token_id", -1), known("pad_token_id", 0)
        return token_ids.TokenIds(vocab_size, eos_id, pad_id)

    def labels(self) -> list[str] | None:
        """Returns the names of the classes; None where the model has none."""
        names = self._source.config.get("id2label")
        if names is None or self.model_config.head not in equality.LABELLED:
            return None
        try:
            return [names[number] for number in sorted(names, key=int)]
        except (TypeError, ValueError) as error:
            raise errors.UserError(
                f"{self._source.path}/config.json: id2label = {names!r} does not number labels"
            ) from error

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self._plan.params.values())


def _is_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays are the same bit for bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return np.array_equal(*(np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b)))


def _is_made(origin: Any) -> bool:
    return isinstance(origin, table.Constant) and origin.make is not None


def import_model(source: source_lib.Source, workdir: str, options: Options) -> str:
    """Writes a model as the checkpoint of a workdir; returns a line that says what was done.

    Raises:
      errors.UserError: as `Conversion`; the folder has checkpoints; or the model has no tokenizer.
    """
    checkpoint.check_new(workdir)
    if source.tokenizer is None and options.has_tokenizer:
        raise errors.UserError(
            f"{source.path} has no tokenizer that llm_jax reads (tokenizer.json, tokenizer.model,"
            " spiece.model, vocab.json with merges.txt, or vocab.txt): put it there, or give"
            f" --tokenizer={tokenizer_files.NONE} for a model whose texts are ids"
        )
    mesh_config = config_lib.MeshConfig(rules="fsdp")
    rules = sharding.axis_rules(mesh_config)
    # However many there are, the checkpoint restores on any mesh.
    mesh = mesh_lib.make(mesh_config, jax.devices()[:1])
    conversion = Conversion(source, options, mesh, rules)
    tokenizer = conversion.tokenizer()
    model = conversion.model_config
    data, objective = config_lib.DataConfig(), config_lib.ObjectiveConfig()
    config = config_lib.RunConfig(
        model=model,
        data=dataclasses.replace(
            data,
            tokenizer=f"workdir:{epath.Path(workdir).expanduser().absolute()}",
            sequence_length=min(data.sequence_length, model.max_length),
        ),
        objective=dataclasses.replace(
            objective,
            name=_objective(model),
            target_length=min(objective.target_length, model.max_length),
        ),
    )
    config_lib.check(config)
    step_dir = checkpoint.save_params(
        workdir,
        config,
        tokenizer.to_dict(),
        conversion.params(),
        conversion.record(),
        conversion.labels(),
    )
    return (
        f"{source.path}, {conversion.family.model_type} with {conversion.num_parameters:,} parameters in"
        f" {model.param_dtype}, is {step_dir}"
    )


def _objective(model: config_lib.ModelConfig) -> str:
    """Returns what `evaluate` scores."""
    return model.head if model.head in config_lib.OBJECTIVES else _OBJECTIVES[model.architecture]
