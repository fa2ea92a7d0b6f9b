"""Tokenizers beside a model: every kind of file, its special ids, and back."""

import io
import json
import pathlib
import tarfile

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax.convert import gguf_tokenizer
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from llm_jax.convert import tokenizer_files
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.sampling import generate
from tests import assets
from tests.convert import folders

CORPUS = ["Fellow-citizens of the Senate, it is 1790: naïve — or not?"] * 20
TEXT = "the Senate of 1790 is naïve 🦙"


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of 300 tokens, of the library."""
    return tokenizer_lib.train_bpe(CORPUS, 300).to_dict()["tokenizer"]


def _json_folder(folder, definition, **files):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "config, files, eos, pad",
    [
        ({"eos_token_id": 7}, {}, 7, 7),
        ({"eos_token_id": 7, "pad_token_id": 3}, {"generation_config": {"eos_token_id": 9}}, 9, 3),
        ({"eos_token_id": [5, 6]}, {}, 5, 5),
        ({"eos_token_id": [5, 0]}, {"tokenizer_config": {"eos_token": "<|endoftext|>"}}, 0, 0),
        ({}, {"tokenizer_config": {"eos_token": {"content": "a"}, "pad_token": "b"}}, "a", "b"),
        ({}, {}, 0, 0),
    ],
)
def test_special_ids_come_from_where_they_stand(config, files, eos, pad, byte_level, tmp_path):
    folder = _json_folder(tmp_path / "model", byte_level, **files)
    read = tokenizer_files.read(folder, config)
    ids = [byte_level["model"]["vocab"][i] if isinstance(i, str) else i for i in (eos, pad)]
    assert [read.eos_id, read.pad_id] == ids


def test_no_end_is_an_error_that_says_so(byte_level, tmp_path):
    definition = byte_level | {"added_tokens": []}
    vocab = {
        f"x{k}" if k == "<|endoftext|>" else k: i for k, i in byte_level["model"]["vocab"].items()
    }
    definition["model"] = byte_level["model"] | {"vocab": vocab}
    folder = _json_folder(tmp_path / "model", definition)
    with pytest.raises(errors.UserError, match="which token ends a text; set eos_token_id"):
        tokenizer_files.read(folder, {})


def test_a_beginning_of_texts_is_kept_and_put_before_prompts(byte_level, tmp_path):
    bos = byte_level["model"]["vocab"]["a"]
    definition = byte_level | {"post_processor": gguf_tokenizer._template("a", bos)}
    read = tokenizer_files.read(_json_folder(tmp_path / "model", definition), {})
    assert read.bos_id == bos
    again = tokenizer_lib.from_dict(json.loads(json.dumps(read.to_dict())))
    assert again.bos_id == bos and bos not in again.encode("x")
    row = generate._Row(generate.Prompt("x"), 0, again, (), None)
    assert row.ids.tolist() == [bos, *again.encode("x")]
    # A source is read as an example is in training: it ends, too.
    row = generate._Row(generate.Prompt("x"), 0, again, (), None, is_source=True)
    assert row.ids.tolist() == [bos, *again.encode("x"), again.eos_id]


def test_broken_files_are_told(tmp_path, byte_level):
    folder = _json_folder(tmp_path / "model", {"model": {"type": "BPE"}, "added_tokens": []})
    with pytest.raises(errors.UserError, match="tokenizer.json is no tokenizer"):
        tokenizer_files.read(folder, {})
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(errors.UserError, match="tokenizer.json is not JSON"):
        tokenizer_files.read(folder, {})


def _export(folder, files, tokenizer):
    folder.mkdir()
    tokenizer_files.write(folder, files, tokenizer)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_come_back_as_they_were(byte_level, tmp_path):
    folder = _json_folder(
        tmp_path / "model", byte_level, tokenizer_config={"x": "é"}, generation_config={"y": 1}
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"\x00\xff")
    (folder / "README.md").write_text("not a tokenizer's")
    read = tokenizer_files.read(folder, {})
    kept = json.loads(json.dumps(tokenizer_files.kept(folder, read)))
    back = _export(tmp_path / "back", kept, tokenizer_lib.from_dict(read.to_dict()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert json.loads(back.pop("tokenizer.json")) == json.loads(before.pop("tokenizer.json"))
    del before["README.md"]
    assert back == before


def test_a_tokenizer_of_ours_is_written_with_its_special_tokens(tmp_path):
    trained = tokenizer_lib.train_bpe(CORPUS, 300)
    back = _export(tmp_path / "back", {}, trained)
    settings = json.loads(back["tokenizer_config.json"])
    assert settings["eos_token"] == settings["pad_token"] == "<|endoftext|>"
    library = tokenizers.Tokenizer.from_str(back["tokenizer.json"].decode())
    assert library.encode(TEXT).ids == trained.encode(TEXT).tolist()


def test_a_run_on_conversations_is_written_with_its_template(tmp_path):
    tokenizer = tokenizer_lib.train_bpe(CORPUS, 300)
    chat = {"source": "{{ messages }}", "tokens": {}}
    tokenizer_files.write(tmp_path, {}, tokenizer, chat)
    assert (tmp_path / "chat_template.jinja").read_text() == chat["source"]
    # What was converted keeps the template among its own files.
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer_files.write(tmp_path, {"tokenizer_config.json": {"text": "{}"}}, tokenizer, chat)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_vocab_and_merges_are_gpt2s(tmp_path, byte_level):
    model = byte_level["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    read = tokenizer_files.read(tmp_path, {})
    expected = tokenizer_lib.train_bpe(CORPUS, 300)
    assert read.encode(TEXT).tolist() == expected.encode(TEXT).tolist()
    assert read.eos_id == model["vocab"]["<|endoftext|>"]
    config = {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UserError, match="of a Qwen2Tokenizer.*tokenizer.json"):
        tokenizer_files.read(tmp_path, {})


def test_word_pieces_are_berts(tmp_path):
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "sen",
        "##ate",
        "is",
        "nai",
        "##ve",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
    read = tokenizer_files.read(tmp_path, {"pad_token_id": 0})
    assert read.encode("The Senate is NAÏVE.").tolist() == [5, 6, 7, 8, 9, 10, 1]
    assert (read.eos_id, read.pad_id, read.cls_id, read.mask_id) == (3, 0, 2, 4)
    assert read.bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert tokenizer_files.read(tmp_path, {}).encode("The").tolist() == [1]
    (tmp_path / "vocab.txt").write_text("\n".join(names[1:]))
    with pytest.raises(errors.UserError, match=r"vocab.txt has no \[PAD\]"):
        tokenizer_files.read(tmp_path, {})
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(errors.UserError, match="vocab.txt is not UTF-8"):
        tokenizer_files.read(tmp_path, {})


def test_lines_of_a_vocabulary_end_at_newlines_alone(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "b", "\x85", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    mask = {"content": "[MASK]", "lstrip": True}
    settings = {"mask_token": mask, "do_lower_case": None, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = tokenizer_files.read(tmp_path, {})
    assert read.encode("a b c").tolist() == [5, 7, 9] and read.mask_id == 4


def test_kept_files_come_back_byte_for_byte(tmp_path):
    tokenizer = tokenizer_lib.train_bpe(CORPUS, 300)
    template = tmp_path / "chat_template.jinja"
    template.write_bytes(b"{{ a }}\r\n{{ b }}\n")
    kept = json.loads(json.dumps(tokenizer_files.kept(tmp_path, tokenizer)))
    back = _export(tmp_path / "back", kept, tokenizer)
    assert back[template.name] == template.read_bytes()


# --- SentencePiece ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("name, has_bos", [("tokenizer.model", True), ("spiece.model", False)])
def test_sentencepiece_models_come_back(name, has_bos, pieces, tmp_path):
    (tmp_path / name).write_bytes(pieces)
    read = tokenizer_files.read(tmp_path, {})
    assert read.bos_id == (1 if has_bos else None)
    kept = tokenizer_files.kept(tmp_path, read)
    assert len(json.dumps(kept)) < 100, "the model is in the tokenizer already"
    back = _export(tmp_path / "back", kept, tokenizer_lib.from_dict(read.to_dict()))
    assert back == {name: pieces}


def test_llamas_may_go_without_a_beginning(pieces, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert tokenizer_files.read(tmp_path, {}).bos_id is None


def test_ggufs_sentencepiece_is_the_model_it_was_made_of(pieces):
    library = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    ids = range(library.vocab_size())
    kinds = [
        2
        if library.is_unknown(i)
        else 3
        if library.is_control(i)
        else 6
        if library.is_byte(i)
        else 1
        for i in ids
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [library.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    read = gguf_tokenizer.read(metadata)
    for text in (TEXT, "  two  spaces ", "", "1790", "日本", "\n\tx", *CORPUS[:1]):
        assert read.encode(text).tolist() == library.encode(text)
    assert (read.bos_id, read.eos_id, read.pad_id, read.vocab_size) == (1, 2, 2, 330)
    assert gguf_tokenizer.read(metadata | {"tokenizer.ggml.add_bos_token": False}).bos_id is None


@pytest.mark.long
def test_ggufs_tokenizers_equal_llama_cpps(tmp_path):
    """By the vocabularies and the texts that llama.cpp tests its own with."""
    package = assets.pip(
        "llama-cpp-python",
        "0.3.36",
        sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        options=("--no-binary=:all:",),
    )
    names = ("gpt-2", "llama-bpe", "llama-spm", "refact", "starcoder")
    files = [f"ggml-vocab-{name}.gguf{end}" for name in names for end in ("", ".inp", ".out")]
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            if member.isfile() and pathlib.Path(member.name).name in files:
                member.name = pathlib.Path(member.name).name
                archive.extract(member, tmp_path, filter="data")
    for name in names:
        path = tmp_path / f"ggml-vocab-{name}.gguf"
        fields = gguf.GGUFReader(path).fields
        read = gguf_tokenizer.read({key: field.contents() for key, field in fields.items()})
        texts = (tmp_path / f"{path.name}.inp").read_text(encoding="utf-8")
        texts = texts.split("\n__ggml_vocab_test__\n")
        lines = (tmp_path / f"{path.name}.out").read_text().split("\n")
        assert len(texts) == len(lines) == 47
        for text, line in zip(texts, lines):
            assert read.encode(text).tolist() == [int(i) for i in line.split()], (name, text)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "x"}, "tokenizer.ggml.pre = 'x'"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.pre = None"),
        ({"tokenizer.ggml.model": "llama"}, "lacks tokens, token_type, scores"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "a"],
                "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
                "tokenizer.ggml.scores": [0.0] * 5,
            },
            "is no SentencePiece model",
        ),
    ],
)
def test_ggufs_other_tokenizers_are_told(changes, expected):
    with pytest.raises(errors.UserError, match=expected):
        gguf_tokenizer.read({"tokenizer.ggml.eos_token_id": 2} | changes)


# --- with a model -------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    folder = folders.copy("llama2", tmp_path / "model")
    source = source_lib.open_folder(folder, has_tokenizer=True)
    with pytest.raises(errors.UserError, match="has no tokenizer.*--tokenizer=none"):
        importing.import_model(source, str(tmp_path / "run"), importing.Options())
    folders.import_ids(folder, tmp_path / "run")
    loaded = tokenizer_lib.load(f"workdir:{tmp_path / 'run'}")
    assert loaded.encode("3 39 0").tolist() == [3, 39, 0] and loaded.eos_id == 2
    assert loaded.decode([3, 39]) == " 3 39"
    with pytest.raises(errors.UserError, match="'x' is no token id"):
        loaded.encode("x")
    with pytest.raises(errors.UserError, match="40 is outside"):
        loaded.encode("40")


def test_a_workdir_keeps_the_tokenizer_of_its_folder(byte_level, tmp_path):
    arrays = {"vocab": np.zeros((300, 16), np.float32)}

    def change(tensors):
        return tensors | {"transformer.wte.weight": arrays["vocab"]}

    folder = folders.copy("gpt2", tmp_path / "model", change, vocab_size=300, eos_token_id=7)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level))
    source = source_lib.open_folder(folder, has_tokenizer=True)
    importing.import_model(source, str(tmp_path / "run"), importing.Options())
    meta = checkpoint.read_latest(str(tmp_path / "run"), None, lambda _, meta: meta)
    assert tokenizer_lib.load(meta.config.data.tokenizer).to_dict() == meta.tokenizer
    back = folders.export(tmp_path / "run", tmp_path / "back")
    assert json.loads((back / "tokenizer.json").read_text()) == byte_level
