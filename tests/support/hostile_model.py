"""Loads a base that tries to run code and to reach hubs in every way that is known: python hostile_model.py FOLDER

Each key is tried at the door, which refuses it, and where weights are walked and a tokenizer is loaded, which an older
workspace may do with it. Prints JSON: how many were tried, refused and used, and what Python's audit hooks saw.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

CODE = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\nclass X: pass\n"
PICKLE = b"cposix\nsystem\n(S'touch RAN'\ntR."
CONFIG: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X", "AutoTokenizer": "code.X"}},
    {"auto_map": {"AutoModelForCausalLM": "owner/name--code.X"}},
    {"custom_pipelines": {"text-generation": {"impl": "code.X", "pt": ["AutoModel"]}}},
    {"attn_implementation": "owner/kernel"},
    {"_attn_implementation": "owner/kernel"},
    {"_attn_implementation_internal": "owner/kernel"},
    {"attn_implementation": "flash_attention_2"},
    {"attribute_map": {"note": "_attn_implementation_internal"}, "note": "owner/kernel"},
    {"experts_implementation": "deepgemm"},
    {"use_pretrained_backbone": True, "backbone": "owner/name"},
    {"compression_config": {"format": "owner/name"}},
]
TOKENIZER: list[dict[str, Any]] = [
    {"auto_map": {"AutoTokenizer": ["code.X", "code.X"]}},
    {"auto_map": {"AutoTokenizer": ["owner/name--code.X", None]}, "tokenizer_class": "XTokenizer"},
]
WATCHED = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")


def main(folder: Path) -> None:
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED:
            seen.append(f"{event} {arguments!r}")
        elif event in ("exec", "open", "import"):
            where = getattr(arguments[0], "co_filename", arguments[0])
            if str(where).startswith(str(folder.parent)) and not str(where).endswith((".json", ".safetensors")):
                seen.append(f"{event} {where!r}")

    import torch

    from copal.dry_load import dry_load
    from copal.errors import ModelError
    from copal.evaluation import evaluate
    from copal.generate import continue_greedily
    from copal.tokenizer import load_tokenizer

    for name in ("code.py", "modeling_llama.py", "tokenization_llama.py", "generate.py", "__init__.py"):
        (folder / name).write_text(CODE)
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "code.py", folder / "custom_generate" / "generate.py")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    (folder / "training_args.bin").write_bytes(PICKLE)
    windows = {"a": torch.zeros(1, 8, dtype=torch.long)}
    sys.addaudithook(watch)
    originals = {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    tried = [(name, keys) for name, all_keys in zip(originals, (CONFIG, TOKENIZER), strict=True) for keys in all_keys]
    refused = used = 0
    for name, keys in [*tried, ("config.json", {})]:
        (folder / name).write_text(json.dumps(originals[name] | keys))
        try:
            dry_load(folder)
        except ModelError:
            refused += 1
        evaluate(folder, windows, dtype=torch.float32)
        continue_greedily(folder, {"a": windows["a"][0]}, tokens=1, dtype=torch.float32)
        used += 1
        try:
            load_tokenizer(folder)
        except ModelError:  # without their code there is none
            assert "auto_map" in keys
        (folder / name).write_text(json.dumps(originals[name]))
    print(json.dumps({"tried": len(tried), "refused": refused, "used": used, "suspicious": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
