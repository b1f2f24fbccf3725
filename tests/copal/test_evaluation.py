from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from copal.errors import ModelError, NumericsError
from copal.evaluation import Score, backward_transfer, evaluate, geometric_mean


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
