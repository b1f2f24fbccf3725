"""llm-compressor prunes half of a model's weights, in a virtual environment of its own: see peers.py.

python tests/bench/peer.py METHOD MODEL WINDOWS OUT DOMAIN...

Reads `<domain>.calibration` (N, L) of the safetensors file WINDOWS; writes a Hugging Face folder; the last line that it
prints is JSON: seconds of the processor without imports, loading and saving, and the most memory that the process had,
in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {"SparseGPT": SparseGPTModifier, "Wanda": WandaPruningModifier}


def main(method: str, folder: str, windows: str, out: str, *domains: str) -> None:
    tokens = load_file(windows)
    ids = torch.cat([tokens[f"{domain}.calibration"] for domain in domains])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    recipe = METHODS[method](sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    began = time.process_time()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    seconds = time.process_time() - began
    model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
