"""Asks llama.cpp, as xllamacpp packs it, what a GGUF file makes of prompts: llama_cpp.py FILE TOKENS PROMPT...

Prints JSON; for each prompt its tokens, the likeliest TOKENS that follow, one by one (`said`), and the natural
logarithm of the probability of every token to be the first of them (`nats`, in the order of the vocabulary).
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp  # in a folder that the caller has put on the path: no test imports this file


def main(file: str, tokens: int, prompts: list[str]) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = file, 512
    # Its threads wait for one another in loops: on a busy machine several take minutes.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)

    def asked(path: str, **question: Any) -> Any:
        request = Request(server.listening_address + path, json.dumps(question).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=300) as answer:
            return json.load(answer)

    greedy = {"temperature": 0, "cache_prompt": False, "ignore_eos": True, "return_tokens": True}
    found = []
    for prompt in prompts:
        read = asked("/tokenize", content=prompt)["tokens"]
        said = asked("/completion", prompt=read, n_predict=tokens, **greedy)["tokens"]
        every = 1 << 20  # more than any vocabulary has
        (first,) = asked("/completion", prompt=read, n_predict=1, n_probs=every, **greedy)["completion_probabilities"]
        nats = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
        found.append({"read": read, "said": said, "nats": [nats[token] for token in sorted(nats)]})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
