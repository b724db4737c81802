"""The tokenizer of a converted folder: every program that opens the folder finds the ids that the model knows."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurformer.data.tokenizer import HF_SWITCHES
from recurformer.files import replacing
from recurformer.reading import LARGEST_LIST, read_table

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

CONFIG = "tokenizer_config.json"

# Options of a copied tokenizer_config.json that stay. Others could add tokens to a text, or name a class that builds
# another tokenizer from the same file.
KEPT = ("chat_template", "model_max_length")
KEPT_TOKENS = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
KEPT_LISTS = ("additional_special_tokens", "extra_special_tokens")


def write_tokenizer(tokenizer: Tokenizer, folder: Path, for_transformers: bool) -> None:
    """Write a tokenizer into a folder that may hold copied files of Hugging Face's form.

    Args:
        tokenizer: the tokenizer.
        folder: the folder.
        for_transformers: write Hugging Face's form too, where transformers is installed.

    Raises:
        ValueError: Hugging Face's form would give other ids.
    """

    copied = read_table(folder / CONFIG, LARGEST_LIST) if (folder / CONFIG).is_file() else None
    tokenizer.save(folder)
    pieces = tokenizer.pieces()
    options = kept_options(copied or {}, set(pieces.values()))
    if for_transformers and find_spec("transformers"):
        from recurformer.hf.tokenizer import hf_tokenizer

        hf_tokenizer(tokenizer, **options).save_pretrained(folder)
    elif copied is not None:
        options |= HF_SWITCHES
        # The class of a family of models would build a tokenizer of its own from the same tokenizer.json.
        known = tokenizer.kind == "tokenizers"
        options["tokenizer_class"] = "PreTrainedTokenizerFast" if known else copied.get("tokenizer_class")
        for name, id in {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}.items():
            if id is not None:
                options[name] = pieces[id]
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def kept_options(copied: dict[str, Any], pieces: set[str]) -> dict[str, Any]:
    """Return the options of a copied `tokenizer_config.json` that change no ids.

    Args:
        copied: content of the file.
        pieces: the vocabulary. A special token outside of it would get a new id, which the model does not have.
    """
    kept = {name: copied[name] for name in KEPT if copied.get(name) is not None}
    for name in KEPT_TOKENS:
        if (token := _content(copied.get(name))) in pieces:
            kept[name] = token
    for name in KEPT_LISTS:
        found = copied.get(name)
        tokens = [_content(token) for token in found] if isinstance(found, list) else []
        if tokens := [token for token in tokens if token in pieces]:
            kept[name] = tokens
    return kept


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
