from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from copal.errors import ModelError, NumericsError
from copal.evaluation import Score, backward_transfer, evaluate, geometric_mean
from copal.streaming import Stream, StreamedModel


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_streamed_perplexity_is_that_of_the_whole_model(make_model, make_windows, cpu, batch) -> None:
    folder, windows = make_model(), make_windows(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(windows).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    score = evaluate(folder, {"a": windows}, device=cpu, dtype=torch.float32, batch=batch)["a"]
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.tokens == windows.shape[0] * (windows.shape[1] - 1)


WINDOW = 32 * 32 * 4  # bytes of a window's hidden states in the tiny model
COUNTS = {"a": 7, "b": 8, "c": 3}


@pytest.mark.parametrize(
    ("hidden_bytes", "parts", "most"),
    [(18 * WINDOW, [3], 18), (10 * WINDOW, [2, 2], 10), (5 * WINDOW, [1] * 5, 5), (1, [1] * 7, 3)],
)
def test_hidden_states_beyond_a_bound_wait_for_another_walk_and_no_score_differs(
    make_model, make_windows, cpu, monkeypatch, hidden_bytes, parts, most
) -> None:
    """In batches of 3; `parts`: domains in each walk, `most`: windows that are held at a time."""
    folder = make_model()
    windows = {name: make_windows(seed, windows=count) for seed, (name, count) in enumerate(COUNTS.items())}
    expected = evaluate(folder, windows, device=cpu, dtype=torch.float32, batch=3)
    told, held, alive = [], [], weakref.WeakSet[Stream]()
    start = StreamedModel.start

    def watched(model: StreamedModel, windows: torch.Tensor, batch: int) -> Stream:
        stream = start(model, windows, batch)
        alive.add(stream)
        return stream

    def progress(stage: str, done: int, total: int) -> None:
        told.append((done, total))
        held.append(sum(each.hidden.nbytes for each in alive))

    monkeypatch.setattr(StreamedModel, "start", watched)
    found = evaluate(
        folder, windows, device=cpu, dtype=torch.float32, batch=3, hidden_bytes=hidden_bytes, progress=progress
    )
    assert found == expected
    assert max(held) == most * WINDOW
    total = 2 * len(parts) + sum(parts)
    assert told == [(done, total) for done in range(1, total + 1)]


def test_perplexity_is_weighted_by_tokens() -> None:
    assert Score(nats=math.log(8) * 3 + math.log(2) * 1, tokens=4).perplexity == pytest.approx(2 ** (10 / 4))


def test_backward_transfer_is_negative_where_an_earlier_domain_got_worse() -> None:
    assert backward_transfer({"code": 10.0}, {"code": 11.0}) == pytest.approx(-math.log(1.1))
    assert backward_transfer({"code": 10.0, "legal": 10.0}, {"code": 20.0, "legal": 5.0}) == pytest.approx(0)
    assert backward_transfer({}, {}) is None


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_a_checkpoint_with_nan_is_named(make_model, make_windows, cpu, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match=rf"on code: {tmp_path}: .* model\.layers\.0\.mlp\.down_proj"):
        evaluate(tmp_path, {"code": make_windows(0)}, device=cpu, dtype=torch.float32)


def test_a_folder_that_is_no_causal_model_is_refused(tmp_path, make_windows, cpu) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        evaluate(tmp_path, {"a": make_windows(0)}, device=cpu, dtype=torch.float32)
