"""The tokenizer beside a model's weights: read from its files, and written back.

    tokenizer.json                     of the `tokenizers` library; the first choice
    tokenizer.model, spiece.model      of SentencePiece
    vocab.json and merges.txt          GPT-2's byte-level BPE
    vocab.txt                          BERT's WordPiece

Which ids begin and end a text and fill rows stands in `generation_config.json`, `config.json` and
`tokenizer_config.json`.
"""

import base64
from collections.abc import Mapping
import json
import logging
import pathlib
from typing import Any

import tokenizers

from llm_jax import errors
from llm_jax.data import bpe
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data import tokenizer_kinds

_LOG = logging.getLogger(__name__)

_JSON, _PIECES = "tokenizer.json", ("tokenizer.model", "spiece.model")
_SETTINGS, _GENERATION = "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"
# Kept as they are, and written back.
_KEPT_TEXT = (
    *(_SETTINGS, _GENERATION, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
_KEPT_BYTES = (*_PIECES, "source.spm", "target.spm")

NONE = "none"  # as `--tokenizer`: ids alone

Files = dict[str, dict[str, str]]  # name -> {"text": ...} or {"base64": ...}


def read(folder: pathlib.Path, config: Mapping[str, Any]) -> tokenizer_lib.Tokenizer | None:
    """Returns the tokenizer of a model's folder; None if it has none.

    Args:
      folder: of the model.
      config: its config.json.

    Raises:
      errors.UserError: its files are broken, or do not say which token ends a text.
    """
    definition = _definition(folder)
    if definition is not None:
        return _of_definition(definition, folder, config)
    for name in _PIECES:
        if (folder / name).is_file():
            loaded = tokenizer_lib.load(f"sentencepiece:{folder / name}")
            settings = _json(folder / _SETTINGS)
            # Llama's and Gemma's begin texts with it, unless they say otherwise.
            has_bos = settings.get("add_bos_token", name == _PIECES[0])
            return loaded.with_bos() if has_bos else loaded
    return None


def kept(folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer | None) -> Files:
    """Returns the files of a folder that the checkpoint keeps, but for what the tokenizer holds itself."""
    found: Files = {}
    for name in _KEPT_TEXT:
        if (folder / name).is_file():
            # Not read_text(), which makes one kind of line end of all.
            found[name] = {"text": (folder / name).read_bytes().decode("utf-8")}
    held = None if tokenizer is None else tokenizer.to_dict().get("model")
    for name in _KEPT_BYTES:
        if (folder / name).is_file():
            content = base64.b64encode((folder / name).read_bytes()).decode("ascii")
            found[name] = {"held": "tokenizer"} if content == held else {"base64": content}
    return found


def write(
    folder: pathlib.Path,
    files: Files,
    tokenizer: tokenizer_lib.Tokenizer,
    chat: dict[str, Any] | None = None,
) -> None:
    """Writes the kept files, and the tokenizer in its own format where they are not it.

    Args:
      folder: to write to.
      files: of a converted model, as they were.
      tokenizer: of the model.
      chat: how conversations are written, as `Meta.chat`; files that are kept have it themselves.
    """
    raw = tokenizer.to_dict()
    for name, content in files.items():
        if "text" in content:
            (folder / name).write_bytes(content["text"].encode("utf-8"))
        else:
            encoded = raw["model"] if "held" in content else content["base64"]
            (folder / name).write_bytes(base64.b64decode(encoded))
    if isinstance(tokenizer, tokenizer_kinds.HuggingFace):
        text = json.dumps(raw["tokenizer"], indent=2, ensure_ascii=False)
        (folder / _JSON).write_text(text, encoding="utf-8")
        if _SETTINGS not in files:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | _names(tokenizer)
            (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            if chat is not None:
                (folder / _TEMPLATE).write_text(chat["source"], encoding="utf-8")
    elif isinstance(tokenizer, tokenizer_kinds.SentencePiece):
        if not any(name in files for name in _PIECES):
            (folder / _PIECES[0]).write_bytes(base64.b64decode(raw["model"]))
    elif isinstance(tokenizer, tokenizer_kinds.Bytes):
        _LOG.warning("the tokenizer is of bytes, which Hugging Face has no files for: none written")


def _names(tokenizer: tokenizer_kinds.HuggingFace) -> dict[str, str]:
    ids = {
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "bos_token": tokenizer.bos_id,
    }
    return {name: tokenizer.token(i) for name, i in ids.items() if i is not None}


def special_ids(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, int]:
    """Returns what a config.json says of a tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return ids | ({} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id})


# --- reading --------------------------------------------------------------------------------------


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a JSON file, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise errors.UserError(f"{path} is no JSON object")
    return content


def _definition(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a `tokenizer.json` holds, or would hold; None without such files."""
    if (folder / _JSON).is_file():
        return _json(folder / _JSON)
    settings = _json(folder / _SETTINGS)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        known = str(settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
        if known != "GPT2Tokenizer":
            raise errors.UserError(
                f"{folder} has vocab.json and merges.txt of a {known}, which cuts text in a way of its"
                f" own: save its {_JSON} beside them, or give --tokenizer={NONE}"
            )
        return bpe.load(folder).to_dict()["tokenizer"]
    if (folder / "vocab.txt").is_file():
        return _word_pieces(folder / "vocab.txt", settings)
    return None


def _content(token: Any) -> str | None:
    """Returns the text of a token, which some files have as an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _known(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns a setting; null is as good as none."""
    value = settings.get(key)
    return default if value is None else value


def _word_pieces(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BERT's tokenizer of a vocabulary, a token a line."""
    try:
        # Not splitlines(): U+2028 and its like may be tokens.
        names = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise errors.UserError(f"{path} is not UTF-8: {error}") from error
    vocab = {name: i for i, name in enumerate(names)}
    special = [_content(settings.get(key)) or default for key, default in (
        ("cls_token", "[CLS]"), ("sep_token", "[SEP]"), ("pad_token", "[PAD]"),
        ("unk_token", "[UNK]"), ("mask_token", "[MASK]"),
    )]  # fmt: skip
    missing = [name for name in special if name not in vocab]
    if missing:
        raise errors.UserError(f"{path} has no {', '.join(missing)}")
    first, last, _, unknown, _ = special
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=_known(settings, "do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=_known(settings, "tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )
    tokenizer.add_special_tokens(special)
    return json.loads(tokenizer.to_str())


def _of_definition(
    definition: dict[str, Any], folder: pathlib.Path, config: Mapping[str, Any]
) -> tokenizer_kinds.HuggingFace:
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise errors.UserError(f"{folder / _JSON} is no tokenizer: {error}") from error
    settings, generation = _json(folder / _SETTINGS), _json(folder / _GENERATION)

    def of_token(key: str) -> int | None:
        name = _content(settings.get(key))
        return None if name is None else library.token_to_id(name)

    def first(*candidates: int | None) -> int | None:
        return next((i for i in candidates if i is not None), None)

    named = of_token("eos_token")
    of_model = generation.get("eos_token_id", config.get("eos_token_id"))
    if isinstance(of_model, list):
        chosen = named if named in of_model else of_model[0]
        _LOG.info("the model ends texts with any of %s; %s is taken", of_model, chosen)
        of_model = chosen
    usual = [library.token_to_id(name) for name in bpe.EOS_NAMES]
    eos_id = first(of_model, named, of_token("sep_token"), *usual)
    if eos_id is None:
        raise errors.UserError(
            f"{folder}: no file says which token ends a text; set eos_token_id in config.json, or give"
            f" --tokenizer={NONE}"
        )
    pad_id = first(of_token("pad_token"), config.get("pad_token_id"), eos_id)
    with_special = library.encode("a").ids
    alone = library.encode("a", add_special_tokens=False).ids
    bos_id = with_special[0] if with_special[1:] == alone else None
    return tokenizer_kinds.HuggingFace(definition, eos_id, pad_id, bos_id)
