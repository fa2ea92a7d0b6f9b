"""Settings of a `config.json` and of `ModelConfig`, one by the other.

A family lists `Setting`s. Each reads some fields of theirs into some of ours, and writes them back. What
none of them can say, in either direction, is an error that names it.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import logging
from typing import Any
from typing import Protocol

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import equality

_LOG = logging.getLogger(__name__)

Json = Mapping[str, Any]
Ours = dict[str, Any]  # fields of ModelConfig
Names = Collection[str]  # of the tensors that there are

# Of every config.json; none of them changes what a model computes.
_COMMON = (
    *(
        "model_type",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
    ),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
    *("initializer_range", "gradient_checkpointing", "task_specific_params", "finetuning_task"),
    *("id2label", "label2id", "problem_type", "num_labels", "tokenizer_class", "unsloth_version"),
    *("chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "auto_map"),
    *("is_encoder_decoder", "is_decoder", "cache_implementation", "prefix", "pruned_heads"),
)

# Where a size of ours may be None, what it is then.
_SIZES = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_width",
    "mlp_dim": "mlp_width",
    "rope_head_dim": "rope_head_width",
    "value_head_dim": "value_width",
    "num_decoder_layers": "decoder_layers",
}


class Setting(Protocol):
    """One fact about a model, in their words and in ours."""

    @property
    def theirs(self) -> tuple[str, ...]:
        """Keys of theirs that are read."""

    def read(self, theirs: Json, names: Names) -> Ours:
        """Returns fields of ours.

        Raises:
          errors.UserError: there is no such model here.
        """

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        """Returns fields of theirs, in the way that `original` has them.

        Raises:
          errors.UserError: they have no such model.
        """


@dataclasses.dataclass(frozen=True)
class Same:
    """A value that both have. `default` is what theirs means where it is not there."""

    key: str
    ours: str
    default: Any = None

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, theirs: Json, names: Names) -> Ours:
        del names
        return {self.ours: theirs.get(self.key, self.default)}

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del original
        # Theirs leave sizes out in fewer places than ours.
        return {self.key: getattr(model, _SIZES.get(self.ours, self.ours))}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value by its name in theirs; of several names for one, the first is written."""

    key: str
    ours: str
    choices: Mapping[Any, Any]
    default: Any = None

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, theirs: Json, names: Names) -> Ours:
        del names
        value = theirs.get(self.key, self.default)
        if value not in self.choices:
            known = ", ".join(map(repr, self.choices))
            raise errors.UserError(f"{self.key} = {value!r} (llm_jax has {known})")
        return {self.ours: self.choices[value]}

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del original
        value = getattr(model, self.ours)
        for name, ours in self.choices.items():
            if ours == value:
                return {self.key: name}
        known = ", ".join(repr(ours) for ours in dict.fromkeys(self.choices.values()))
        raise errors.UserError(f"config.model.{self.ours} = {value!r} (it has {known})")


@dataclasses.dataclass(frozen=True)
class Only:
    """A value of theirs that has to be one of a few; the first is the one that is written."""

    key: str
    values: tuple[Any, ...]
    default: Any = None

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, theirs: Json, names: Names) -> Ours:
        del names
        value = theirs.get(self.key, self.default)
        if value not in self.values:
            known = " or ".join(map(repr, self.values))
            raise errors.UserError(f"{self.key} = {value!r} (llm_jax has {known} alone)")
        return {}

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del model, original
        return {self.key: self.values[0]}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Fields of ours that every model of a family has."""

    ours: Mapping[str, Any]
    theirs: tuple[str, ...] = ()

    def read(self, theirs: Json, names: Names) -> Ours:
        del theirs, names
        return dict(self.ours)

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del model, original
        return {}


@dataclasses.dataclass(frozen=True)
class Unread:
    """Keys of theirs that say nothing about what a model computes."""

    theirs: tuple[str, ...]

    def read(self, theirs: Json, names: Names) -> Ours:
        del theirs, names
        return {}

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del model, original
        return {}


@dataclasses.dataclass(frozen=True)
class Dropout:
    """A rate that training reads; of several keys of theirs the first one counts."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    default: float = 0.0

    def read(self, theirs: Json, names: Names) -> Ours:
        del names
        rates = {key: theirs.get(key, self.default) for key in self.theirs}
        if len(set(rates.values())) > 1:
            _LOG.warning("dropout rates %s differ: %s is taken for all", rates, self.theirs[0])
        return dict.fromkeys(self.ours, rates[self.theirs[0]])

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del original
        return dict.fromkeys(self.theirs, getattr(model, self.ours[0]))


@dataclasses.dataclass(frozen=True)
class Custom:
    """What takes a function in each direction."""

    theirs: tuple[str, ...]
    read: Callable[[Json, Names], Ours]
    write: Callable[[config_lib.ModelConfig, Json], Ours]


@dataclasses.dataclass(frozen=True)
class Heads:
    """What reads the last states, by the class in `architectures`; the first one is the default."""

    classes: Mapping[str, Mapping[str, Any]]
    theirs: tuple[str, ...] = ()

    def read(self, theirs: Json, names: Names) -> Ours:
        del names
        name = next(iter(theirs.get("architectures") or self.classes))
        if name not in self.classes:
            hint = errors.nearest(name, self.classes)
            known = ", ".join(self.classes)
            raise errors.UserError(f"architectures = {name!r}{hint} (llm_jax has {known})")
        labels = theirs.get("id2label")
        num_labels = theirs.get("num_labels", 2) if labels is None else len(labels)
        is_labelled = self.classes[name]["head"] in equality.LABELLED
        return dict(self.classes[name]) | ({"num_labels": num_labels} if is_labelled else {})

    def write(self, model: config_lib.ModelConfig, original: Json) -> Ours:
        del original
        fitting = [
            name
            for name, ours in self.classes.items()
            if all(getattr(model, field) == value for field, value in ours.items())
        ]
        if not fitting:
            heads = ", ".join(dict.fromkeys(repr(ours["head"]) for ours in self.classes.values()))
            raise errors.UserError(f"config.model.head = {model.head!r} (it has {heads})")
        theirs = {"architectures": fitting[:1]}
        if model.head in equality.LABELLED:
            theirs |= of_labels([f"LABEL_{i}" for i in range(model.num_labels)])
        return theirs


def of_labels(labels: Sequence[str]) -> Ours:
    """Returns what a `config.json` says of classes."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def to_ours(
    settings: tuple[Setting, ...], theirs: Json, names: Names, where: str
) -> config_lib.ModelConfig:
    """Returns the model that a `config.json` describes.

    Args:
      settings: of its family.
      theirs: the content of the file.
      names: of the tensors beside it.
      where: names the file in errors.

    Raises:
      errors.UserError: names each setting that llm_jax has no model for.
    """
    ours: Ours = {}
    problems = []
    for setting in settings:
        try:
            ours |= setting.read(theirs, names)
        except errors.UserError as error:
            problems.append(str(error))
        except (TypeError, ValueError, AttributeError) as error:  # null, or text, for a number
            values = ", ".join(f"{key} = {theirs.get(key)!r}" for key in setting.theirs)
            problems.append(f"{values} ({error})")
    if problems:
        raise errors.UserError(f"{where} cannot be represented: {'; '.join(problems)}")
    known = {*_COMMON, *itertools.chain.from_iterable(s.theirs for s in settings)}
    unknown = sorted(key for key in theirs if key not in known)
    if unknown:
        _LOG.warning("%s has settings that llm_jax does not know: %s", where, ", ".join(unknown))
    try:
        shortest = {"data": {"sequence_length": 1}, "objective": {"target_length": 1}}
        nested = {
            name: config_lib.to_dict(value) if dataclasses.is_dataclass(value) else value
            for name, value in ours.items()
        }
        return _shortened(config_lib.from_dict({"model": nested} | shortest).model)
    except errors.UserError as error:
        raise errors.UserError(f"{where}: {error}") from error


def _shortened(m: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """Returns the config without the sizes that follow from others, as one writes it by hand."""
    follow = {
        "num_kv_heads": m.num_heads,
        "head_dim": m.embed_dim / m.num_heads,
        "mlp_dim": 4 * m.embed_dim,
        "num_decoder_layers": m.num_layers,
    }
    if m.kv_latent_dim is not None:
        follow |= {"rope_head_dim": m.head_width / 2, "value_head_dim": m.head_width}
    following = [name for name, value in follow.items() if getattr(m, name) == value]
    if m.moe.is_on and m.moe.expert_dim == m.mlp_width:
        m = dataclasses.replace(m, moe=dataclasses.replace(m.moe, expert_dim=None))
    return dataclasses.replace(m, **dict.fromkeys(following))


def to_theirs(
    settings: tuple[Setting, ...],
    model: config_lib.ModelConfig,
    original: Json,
    names: Names,
    family: str,
) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
      settings: of its family.
      model: to be described.
      original: the file that it came from: what still holds stays as it is; empty if there is none.
      names: of the tensors that go with it.
      family: names the family in errors.

    Raises:
      errors.UserError: names each setting that the family has no model for.
    """
    theirs = dict(original)
    problems = []
    for setting in settings:
        if original and equality.is_same(
            model, dataclasses.replace(model, **setting.read(original, names))
        ):
            continue
        try:
            theirs |= setting.write(model, original)
        except errors.UserError as error:
            problems.append(str(error))
    if not problems:
        # What no setting speaks of must be what the family has.
        back = to_ours(settings, theirs, names, f"config.json of {family}")
        problems = [
            f"config.model.{name} = {value!r} (it has {other!r})"
            for name, value, other in equality.differences(model, back)
            if name not in equality.TRAINING
        ]
        for name in equality.TRAINING:
            if getattr(model, name) != getattr(back, name):
                _LOG.warning("%s has no place for config.model.%s; training read it", family, name)
    if problems:
        raise errors.UserError(f"{family} cannot represent {'; '.join(problems)}")
    return theirs
