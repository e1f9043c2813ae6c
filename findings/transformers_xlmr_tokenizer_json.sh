#!/usr/bin/env bash
# AutoTokenizer, for a config.json of model_type xlm-roberta, takes the vocabulary of tokenizer.json but not its Lowercase and NFKC, its pre-tokeniser, its
# template or its unk_id: XLMRobertaTokenizer builds its own, with the unknown token at id 3 whatever the file says. Nothing warns. A file that lowercases
# no longer does, and where id 3 is an ordinary word every unknown word becomes that word, while unk_token_id still gives the id of <unk>. A file without
# <mask> gets one, after its last id. tokenizer_class XLMRobertaTokenizerFast in tokenizer_config.json changes nothing. What helps is
# PreTrainedTokenizerFast there (TokenizersBackend, its name now, does the same): the file is then used as it is, but unk_token and pad_token have to be
# named beside it, else both are None and padding raises ValueError.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$here/env/bin/python" - "$here" <<'PY'
import json
import logging
import sys
import warnings
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC, Lowercase, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

heard = []


class Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        heard.append(record.getMessage())


logging.getLogger("transformers").addHandler(Ear(logging.WARNING))
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: heard.append(str(message))


def written(name: str, words: list[str], tokenizer_config: dict[str, str] | None = None, template: str = "<s> $A </s>") -> Path:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    tokenizer = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=words.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = Sequence([NFKC(), Lowercase()])
    tokenizer.pre_tokenizer = Metaspace()
    ends = [(end, words.index(end)) for end in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def both(folder: Path, text: str) -> tuple[list[int], list[int]]:
    own = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = auto(text)["input_ids"]
    print(f"{folder.name}: {text!r} own {own} {type(auto).__name__} {ids}, unk {auto.unk_token_id} pad {auto.pad_token_id} of {len(auto)} tokens")
    return own, ids


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
usual = ["<s>", "<pad>", "</s>", "<unk>", "▁apple", "▁", "a"]
moved = ["<unk>", "<s>", "</s>", "▁apple", "▁pear", "<pad>"]
text = "Apple APPLE"

lost = {"none": None, "fast": {"tokenizer_class": "XLMRobertaTokenizerFast"}}
for name, config in lost.items():
    assert both(written(name, usual, config), text) == ([0, 4, 4, 2], [0, 5, 3, 5, 3, 2]), "this has changed"

assert both(written("template", usual, template="$A </s>"), "apple") == ([4, 2], [0, 4, 2]), "this has changed"

folder = written("moved", moved)
assert both(folder, "pear plum") == ([1, 4, 0, 2], [1, 4, 3, 2]), "this has changed"
auto = transformers.AutoTokenizer.from_pretrained(folder)
assert auto.unk_token_id == 0 and auto.convert_ids_to_tokens(3) == "▁apple", "this has changed"
assert len(auto) == len(moved) + 1 and auto.mask_token_id == len(moved), "this has changed"

for name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
    folder = written(name, usual, {"tokenizer_class": name})
    assert both(folder, text) == ([0, 4, 4, 2], [0, 4, 4, 2]), "this has changed"
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto.unk_token_id is None and auto.pad_token_id is None and len(auto) == len(usual), "this has changed"
    try:
        auto(["apple", "apple apple"], padding=True)
    except ValueError as error:
        print("  padding:", str(error).partition(".")[0])
    else:
        raise SystemExit("this has changed")

folder = written("named", moved, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>"})
assert both(folder, "Pear plum") == ([1, 4, 0, 2], [1, 4, 0, 2]), "this has changed"
auto = transformers.AutoTokenizer.from_pretrained(folder)
assert (auto.unk_token_id, auto.pad_token_id, len(auto)) == (0, 5, len(moved)), "this has changed"

print("warnings heard:", heard)
assert not heard, "this has changed"
PY
echo "as found"
