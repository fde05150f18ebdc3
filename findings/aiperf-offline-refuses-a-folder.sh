#!/usr/bin/env bash
# aiperf reads a tokenizer from a local folder (`--tokenizer ./folder`) while HF_HUB_OFFLINE is unset, and refuses the same
# folder with HF_HUB_OFFLINE=1, the setting for machines without a network, where a local folder is all there is: offline it
# takes the path for the name of a repository and looks it up in the hub's cache. transformers reads it either way.
#
# Seen with aiperf 0.13.0 (PyPI), Python 3.11, Linux x86-64, 2026-11-28:
#   transformers, HF_HUB_OFFLINE=1: 2 tokens
#   aiperf, HF_HUB_OFFLINE unset: 2 tokens
#   aiperf, HF_HUB_OFFLINE=1: HFValidationError
# Needs Python 3.11 or later; one GB of packages.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q aiperf==0.13.0
cat > make.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained("folder")
PYTHON
cat > read.py <<'PYTHON'
import os
import sys

what = sys.argv[1]
if what == "aiperf":
    from aiperf.common.tokenizer import Tokenizer as Reader
else:
    from transformers import AutoTokenizer as Reader
state = "=" + os.environ["HF_HUB_OFFLINE"] if "HF_HUB_OFFLINE" in os.environ else " unset"
try:
    said = f"{len(Reader.from_pretrained(os.path.abspath('folder')).encode('hello world'))} tokens"
except Exception as raised:
    # aiperf wraps the cause; its words name it.
    said = "HFValidationError" if "HFValidationError" in f"{type(raised)} {raised}" else repr(raised)
print(f"{what}, HF_HUB_OFFLINE{state}: {said}")
PYTHON
unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
venv/bin/python make.py 2> /dev/null
{
    HF_HUB_OFFLINE=1 venv/bin/python read.py transformers
    venv/bin/python read.py aiperf
    HF_HUB_OFFLINE=1 venv/bin/python read.py aiperf
} 2> /dev/null | tee seen
diff - seen <<'WANTED'
transformers, HF_HUB_OFFLINE=1: 2 tokens
aiperf, HF_HUB_OFFLINE unset: 2 tokens
aiperf, HF_HUB_OFFLINE=1: HFValidationError
WANTED
