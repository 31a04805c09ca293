"""Text to token ids: Hugging Face tokenizers and bare SentencePiece models behind one face."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdscale.data.spelling import Spelling, spell_byte_level, spell_piece
from kdscale.errors import DataError, ModelError

Message = dict[str, Any]


class Tokenizer(Protocol):
    """What data and evaluation need of a tokenizer."""

    vocab_size: int
    """True vocabulary: largest id + 1, added tokens included."""
    eos_id: int | None
    fingerprint: str
    """sha256 over everything that decides the ids of a text; tokenizers that agree on it may end documents and write messages
    differently."""
    chat_template: str | None
    """What ``render`` writes messages by, the special tokens named in it included; none where there is no template."""

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Ids of ``text``, with what the tokenizer itself puts around it and nothing else; cut to ``most`` ids, those around
        it included."""
        ...

    def encode_placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of ``text`` as ``encode`` gives them, and from which character of it to which each goes."""
        ...

    def spelling(self) -> Spelling:
        """The bytes of every token. Raises: ModelError for tokens that stand for no fixed bytes."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out."""
        ...

    def render(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation in the chat template, and which belong to what the assistant says.

        Raises:
            DataError: no template, or one that a longer conversation does not extend.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write files beside an exported model from which ``AutoTokenizer`` loads the same tokenizer."""
        ...


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer from a Hugging Face directory, a hub name or a SentencePiece ``.model`` file.

    Raises:
        ModelError: nothing there, or nothing usable.
    """
    if path.endswith(".model"):
        return SentencePieceTokenizer(Path(path))
    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{path} holds no usable tokenizer: {first}; give a Hugging Face directory, a hub name or a SentencePiece"
            " .model file (data.tokenizer)"
        ) from error


_SAMPLE = "  def f(x):\n\n\treturn 'na\u00efve \u2615' * 12.50  # the end\n"


def require_exportable(tokenizer: Tokenizer, name: str) -> None:
    """Whether transformers reads a text by what ``tokenizer`` saves as it does itself. Raises: ModelError."""
    with tempfile.TemporaryDirectory(prefix="kdscale-tokenizer-") as directory:
        tokenizer.save(Path(directory))
        saved = load_tokenizer(directory)
    if saved.encode(_SAMPLE) != tokenizer.encode(_SAMPLE):
        raise ModelError(
            f"{name} cannot be exported: transformers reads another text's tokens with what is saved of it; of SentencePiece,"
            " BPE models without normalization can (`kdscale tokenizer train` makes one)"
        )


class HuggingFaceTokenizer:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id: int | None = tokenizer.eos_token_id
        digest = hashlib.sha256()
        digest.update(json.dumps(sorted((index, token) for token, index in vocabulary.items())).encode())
        digest.update(self._rules().encode())
        self.fingerprint = digest.hexdigest()
        template = tokenizer.chat_template
        # It takes special tokens by name (`eos_token`).
        self.chat_template = json.dumps([template, tokenizer.special_tokens_map], sort_keys=True) if template else None

    def _rules(self) -> str:
        """How text is split: the backend's own description, without the state of padding and truncation."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return type(self._tokenizer).__name__
        described = json.loads(backend.to_str())
        described.pop("padding", None)
        described.pop("truncation", None)
        described.get("model", {}).pop("vocab", None)
        return json.dumps(described, sort_keys=True)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        return list(self._tokenizer(text, verbose=False, truncation=most is not None, max_length=most)["input_ids"])

    def encode_placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._tokenizer.is_fast:
            raise ModelError(
                f"{type(self._tokenizer).__name__} does not tell where its tokens are; use a tokenizer.json"
            )
        found = self._tokenizer(text, verbose=False, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def spelling(self) -> Spelling:
        described = self._rules()
        byte_level = '"ByteLevel"' in described
        if not byte_level and '"Metaspace"' not in described and "\\u2581" not in described:
            raise ModelError(
                f"a {type(self._tokenizer).__name__} whose tokens are neither byte-level BPE's nor SentencePiece's cannot be"
                " aligned by bytes"
            )
        found: Spelling = [None] * self.vocab_size
        for token, index in self._tokenizer.get_vocab().items():
            found[index] = spell_byte_level(token) if byte_level else spell_piece(token)
        for index, added in self._tokenizer.added_tokens_decoder.items():
            found[index] = None if added.special else added.content.encode()
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        if self.chat_template is None:
            raise DataError("messages need a chat template, and the tokenizer has none; use prompt + completion")
        ids: list[int] = []
        trained: list[bool] = []
        for count, message in enumerate(messages, start=1):
            so_far = self._template(messages[:count], add_generation_prompt=False)
            if message.get("role") == "assistant":
                # The template's own opening of the answer is given, not learned.
                opening = self._template(messages[: count - 1], add_generation_prompt=True)
                if so_far[: len(opening)] == opening:
                    trained += [False] * (len(opening) - len(ids))
                    ids = opening
            if so_far[: len(ids)] != ids:
                raise DataError("the chat template changes earlier messages when one is added; use prompt + completion")
            trained += [message.get("role") == "assistant"] * (len(so_far) - len(ids))
            ids = so_far
        return ids, trained

    def _template(self, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
        if not messages:
            return []
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def save(self, directory: Path) -> None:
        self._tokenizer.save_pretrained(directory)


class SentencePieceTokenizer:
    """A bare SentencePiece model."""

    def __init__(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ModelError(f"cannot read the SentencePiece model {path}: {error}") from error
        self._path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(raw)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.GetPieceSize()
        if self.vocab_size == 0:
            raise ModelError(f"{path} is a SentencePiece model without pieces")
        eos = self._processor.eos_id()
        self.eos_id: int | None = eos if eos >= 0 else None
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.chat_template: str | None = None

    def encode(self, text: str, most: int | None = None) -> list[int]:
        return list(self._processor.EncodeAsIds(text))[:most]

    def encode_placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._processor.EncodeAsOffsetMapping(text)
        return list(found["ids"]), list(found["offsets"])

    def spelling(self) -> Spelling:
        pieces = self._processor
        none = (pieces.IsControl, pieces.IsUnknown, pieces.IsUnused)
        return [
            None if any(is_none(index) for is_none in none) else spell_piece(pieces.IdToPiece(index))
            for index in range(self.vocab_size)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.DecodeIds([int(one) for one in ids]))

    def render(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        raise DataError(
            f"messages need a chat template, and {self._path} is a bare SentencePiece model; use prompt + completion"
        )

    def save(self, directory: Path) -> None:
        """As a Llama tokenizer, whose class reads SentencePiece files."""
        shutil.copyfile(self._path, directory / "tokenizer.model")
        pieces = self._processor
        special = {
            f"{name}_token": pieces.IdToPiece(index)
            for name, index in (("bos", pieces.bos_id()), ("eos", pieces.eos_id()), ("unk", pieces.unk_id()))
            if index >= 0
        }
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, **special}
        # Whether the model puts a space before a text.
        config["add_prefix_space"] = self._processor.EncodeAsPieces("a")[0].startswith("\N{LOWER ONE EIGHTH BLOCK}")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
