"""What the gates say: each fails for its own reason, and what a step that ignores the state leads to does not pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.gates.judge import GateResult, failed, judge
from flows.lineage.record import Domain, Parent, Record, Seconds, Sparsity
from flows.lineage.tasks import TaskFigures
from flows.settings import GateSettings
from flows.step import run
from flows.step.run import plain_tasks, run_step
from support.histories import a_domain, a_layer, a_record, a_root

# Of the demo: perplexity by version and domain, and of the dense base.
DENSE = {"code": 11.04, "legal": 10.10, "medical": 8.25}
DEMO = {
    2: {"code": 14.54},
    3: {"code": 14.90, "legal": 14.62},
    4: {"code": 15.69, "legal": 15.76, "medical": 9.97},
}
# What ignores the domains before the newest one, in the table of the domains one by one at 50%.
IGNORANT = {
    "Wanda": {"code": 29.57, "legal": 48.23, "medical": 12.26},
    "SparseGPT": {"code": 45.23, "legal": 90.98, "medical": 10.78},
}
OFF = GateSettings(forgetting=None, champion=None, dense=None, improvement=False, generation=False)


def entry(name: str, made_in: int | None) -> Domain:
    return a_domain(name, made_in).model_copy(update={"evaluation_digest": f"windows of {name}"})


def record(version: int, perplexity: dict[str, float], before: float | None = None) -> Record:
    """The record of version 2, 3, 4, which each brought the domain that the one before it has not."""
    names = list(DEMO[4])[: version - 1]
    domains = [entry(name, made_in if made_in < version else None) for made_in, name in enumerate(names, start=2)]
    return a_record(
        parent=Parent(version=version - 1, digest="0" * 64),
        step=domains[-1],
        domains=tuple(domains),
        sparsity=Sparsity(target=0.5, counted=0.5),
        layers=(a_layer(name="q"), a_layer(name="k")),
        perplexity=perplexity,
        dense_perplexity={name: DENSE[name] for name in perplexity},
        perplexity_before=30.0 if before is None else before,
    )


def altered(made: Record, **changes: Any) -> Record:
    """With values that no record may hold, too."""
    return made.model_copy(update=changes)


OTHERS = {1: a_root(), 2: record(2, DEMO[2]), 3: record(3, DEMO[3])}


def judged(made: Record, *, settings: GateSettings | None = None, champion: int | None = 3, **more) -> dict:
    arguments = {"rounding": 1e-3, "generation": dict.fromkeys(made.perplexity), "problems": []} | more
    results = judge(made, OTHERS, champion, settings or GateSettings(), **arguments)
    return {result.name: result for result in results}


def failing(results: dict[str, GateResult]) -> list[str]:
    return [result.name for result in failed(list(results.values()))]


@pytest.mark.parametrize(("version", "champion"), [(2, None), (2, 1), (3, 1), (3, 2), (4, 2), (4, 3)])
def test_the_steps_of_the_demo_pass(version, champion):
    assert failing(judged(record(version, DEMO[version]), champion=champion)) == []


@pytest.mark.parametrize("method", IGNORANT)
def test_what_ignores_the_domains_before_it_fails(method):
    assert failing(judged(record(4, IGNORANT[method]), champion=None)) == ["forgetting", "dense"]
    assert failing(judged(record(4, IGNORANT[method]))) == ["forgetting", "champion", "dense"]


def test_forgetting_is_against_the_version_that_brought_the_domain():
    made = record(4, DEMO[4] | {"code": 14.54 * 1.16})
    result = judged(made, champion=None)["forgetting"]
    assert (result.passed, result.value, result.limit) == (False, pytest.approx(0.16), 0.15)
    assert result.detail == "code: 16.87, 14.54 when it was the newest"
    assert failing(judged(made, settings=GateSettings(forgetting=0.17), champion=None)) == []
    assert failing(judged(made, champion=2)) == ["forgetting", "champion"]


def test_the_champion_has_a_limit_of_its_own():
    made = record(4, DEMO[4] | {"legal": 14.62 * 1.14})
    assert failing(judged(made)) == ["champion"]
    assert failing(judged(made, champion=2)) == []  # which does not know legal
    assert judged(made, champion=None)["champion"].detail == "there is no champion"
    assert judged(made, champion=1)["champion"].detail == "champion 1 knows none of the domains"
    assert judged(made, champion=9)["champion"].detail == "the record of champion 9 is not there"


def test_figures_on_other_windows_do_not_compare():
    made = record(4, DEMO[4] | {"code": 100.0, "legal": 15.0})
    others = [domain.model_copy(update={"evaluation_digest": "others"}) for domain in made.domains]
    made = altered(made, domains=(others[0], *made.domains[1:]))
    results = judged(made, settings=GateSettings(dense=None))
    assert failing(results) == []
    assert results["forgetting"].detail.endswith("; not comparable (other windows): code")
    made = altered(made, domains=(*others[:2], made.domains[2]))
    assert judged(made)["forgetting"].detail == "not comparable (other windows): code, legal"


def test_the_new_domain_is_better_than_in_the_parent():
    assert failing(judged(record(4, DEMO[4], before=9.97))) == ["improvement"]
    assert failing(judged(record(4, DEMO[4], before=9.98))) == []
    assert judged(record(2, DEMO[2], before=1.0))["improvement"].detail == "the parent is the dense base"
    made = record(4, DEMO[4], before=1.0)
    assert judged(altered(made, step=None))["improvement"].detail == "no domain was added"  # it withdrew one
    assert judged(made, settings=GateSettings(improvement=False))["improvement"].detail == "turned off"


def test_new_data_of_a_known_domain_may_be_no_better_but_not_much_worse():
    made = record(4, DEMO[4], before=15.0)
    new = entry("legal", None).model_copy(update={"evaluation_digest": "of new data"})
    made = altered(made, step=new, domains=(made.domains[0], new, made.domains[2]))
    assert failing(judged(made)) == []  # 15.76 after 15.0
    assert failing(judged(altered(made, perplexity_before=13.0))) == ["improvement"]


@pytest.mark.parametrize(
    ("target", "counted", "layer", "passes"),
    [
        (0.5, 0.5, 0.5, True),
        (0.5, 0.5009, 0.5009, True),
        (0.5, 0.502, 0.5, False),
        (0.5, 0.5, 0.49, False),
        (0.7, 0.5, 0.5, False),
        ("2:4", 0.5, 0.5, True),
        ("2:4", 0.5001, 0.5001, False),
        ("2:4", 0.5, 0.4999, False),
        ("1:4", 0.5, 0.5, False),
        (0.5, math.nan, 0.5, False),
    ],
)
def test_sparsity_is_the_one_wanted_in_the_whole_and_in_every_layer(target, counted, layer, passes):
    made = altered(
        record(4, DEMO[4]),
        sparsity=Sparsity(target=target, counted=0.5).model_copy(update={"counted": counted}),
        layers=(a_layer(sparsity=0.5), a_layer(sparsity=layer)),
    )
    result = judged(made)["sparsity"]
    assert result.passed == passes
    if not math.isnan(counted):
        assert failing(judged(made)) == ([] if passes else ["sparsity"])


@pytest.mark.parametrize(
    ("target", "counted", "layer", "passes"),
    [
        (0.5, 0.5, 0.21, True),
        (0.5, 0.5, 0.79, True),
        (0.5, 0.5, 0.19, False),
        (0.5, 0.51, 0.5, False),
        ("2:4", 0.5, 0.49, False),
    ],
)
def test_where_the_loss_decides_layers_may_differ_by_the_spread_and_the_whole_may_not(target, counted, layer, passes):
    made = altered(
        record(4, DEMO[4]),
        sparsity=Sparsity(target=target, counted=counted),
        layers=(a_layer(sparsity=0.5), a_layer(sparsity=layer)),
        settings={"prune": {"criterion": "loss", "spread": 0.3}},
    )
    assert judged(made)["sparsity"].passed == passes


def test_perplexity_has_a_limit_against_the_dense_base():
    made = record(4, DEMO[4] | {"medical": 8.25 * 2.01})
    assert failing(judged(made)) == ["dense"]
    assert judged(made)["dense"].value == pytest.approx(2.01)
    assert failing(judged(made, settings=GateSettings(dense=3))) == []


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_no_figure_is_nan(figure):
    made = altered(record(4, DEMO[4]), seconds=Seconds.model_construct(solve=figure))
    assert failing(judged(made)) == ["finite"]
    assert judged(made)["finite"].detail == "NaN or infinity: seconds.solve"
    made = altered(made, perplexity=DEMO[4] | {"code": figure})
    assert failing(judged(made)) == ["forgetting", "champion", "dense", "finite"]
    assert all(result.value is None for result in judged(made).values() if result.name == "forgetting")


def test_text_and_files_have_gates():
    made = record(4, DEMO[4])
    bad = judged(made, generation={"code": None, "legal": "nothing but spaces"})
    assert failing(bad) == ["generation"]
    assert bad["generation"].detail == "legal: nothing but spaces"
    assert failing(judged(made, settings=GateSettings(generation=False), generation={"legal": "bad"})) == []
    assert failing(judged(made, problems=["changed: model/model.safetensors"])) == ["lineage"]


def asked(figure: float, dense: float, metric: str = "acc", higher_is_better: bool = True) -> TaskFigures:
    return TaskFigures(
        digest="a" * 64,
        harness="0.4.13",
        documents=200,
        metric=metric,
        higher_is_better=higher_is_better,
        figures={metric: figure},
        dense={metric: dense},
    )


def test_the_tasks_of_domains_are_held_against_the_dense_base():
    tasks = {"code": {"choice": asked(0.5, 0.6)}, "legal": {"clauses": asked(3.0, 2.9, "perplexity", False)}}
    made = altered(record(4, DEMO[4]), tasks=tasks)
    assert failing(judged(made, settings=GateSettings(tasks=0.17))) == []
    result = judged(made, settings=GateSettings(tasks=0.16))["tasks"]
    assert (result.passed, result.value, result.limit) == (False, pytest.approx(1 / 6), 0.16)
    assert result.detail == "choice of code: acc 0.5, 0.6 in the dense base, 200 questions"
    fewer = altered(made, tasks={"legal": tasks["legal"]})
    assert judged(fewer, settings=GateSettings(tasks=0.03))["tasks"].passed is False  # less is better there
    better = altered(made, tasks={"legal": {"clauses": asked(0.7, 0.6)}})
    assert judged(better, settings=GateSettings(tasks=0.01))["tasks"].passed
    nothing = altered(made, tasks={"legal": {"clauses": asked(0.0, 0.0)}})
    assert judged(nothing, settings=GateSettings(tasks=0.01))["tasks"].passed
    assert judged(made)["tasks"].detail == "turned off"
    assert "tasks" not in judged(record(4, DEMO[4]), settings=GateSettings(tasks=0.1))


def test_what_is_off_passes_and_what_cannot_be_turned_off_stays():
    results = judged(record(4, IGNORANT["SparseGPT"]), settings=OFF, problems=["extra: model/x"])
    assert failing(results) == ["lineage"]
    off = [name for name, result in results.items() if result.detail == "turned off"]
    assert off == ["forgetting", "champion", "improvement", "dense", "generation"]


@given(
    figures=st.lists(st.floats(1, 100), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
    champion=st.sampled_from([None, 1, 2, 3]),
)
def test_the_order_of_the_domains_does_not_matter(figures, order, champion):
    made = record(4, dict(zip(DEMO[4], figures, strict=True)))
    domains = tuple(made.domains[place] for place in order)
    perplexity = {domain.name: made.perplexity[domain.name] for domain in domains}
    shuffled = altered(made, domains=domains, perplexity=perplexity)
    assert judged(shuffled, champion=champion) == judged(made, champion=champion)


# -- on a model that has learnt something: with the state a step passes, without it it fails


@pytest.fixture(scope="module")
def learnt(make_learnt_bench, tmp_path_factory):
    """A workspace whose base knows three languages."""
    return make_learnt_bench(tmp_path_factory.mktemp("gates") / "workspace")


def take(bench, name: str) -> list[list[str]]:
    """The failing gates of each step of a new lineage."""
    bench.set(f"name: {bench.settings.model.name}", f"name: {name}")
    bench.register_root()
    made = [run_step(bench.project, domain, None, plain_tasks()) for domain in ("code", "legal", "medical")]
    return [[gate.name for gate in failed(one.gates)] for one in made]


def test_a_step_with_the_state_passes_every_gate(learnt):
    assert take(learnt, "with-state") == [[], [], []]


def test_a_step_that_ignores_the_state_fails_a_gate(learnt, monkeypatch):
    prune = run.prune_domain

    def ignorant(settings, step, data, progress):
        return prune(settings, replace(step, parent=None), data, progress)

    monkeypatch.setattr(run, "prune_domain", ignorant)
    first, second, third = take(learnt, "without-state")
    assert first == []
    assert "forgetting" in second
    assert "forgetting" in third
    assert [version.gates for version in learnt.registry.versions()] == [None, "passed", "failed", "failed"]
    assert learnt.registry.alias("challenger") == 2


def test_text_of_a_model_that_says_one_thing_only_does_not_pass(learnt, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    from copal.generate import continue_greedily

    model = AutoModelForCausalLM.from_pretrained(learnt.base)
    prompts = {"a": torch.arange(2, 34), "b": torch.arange(40, 72)}
    good = continue_greedily(learnt.base, prompts, tokens=16, dtype=torch.float32)
    assert [len(text.tokens) for text in good.values()] == [16, 16]
    ids = model.generate(prompts["a"][None], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tuple(ids[0, 32:].tolist()) == good["a"].tokens
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.save_pretrained(tmp_path / "mute")
        model.model.norm.weight.fill_(math.nan)
        model.save_pretrained(tmp_path / "nan")
    mute = continue_greedily(tmp_path / "mute", prompts, dtype=torch.float32)
    assert all(text.degenerate and text.finite for text in mute.values())
    broken = continue_greedily(tmp_path / "nan", prompts, dtype=torch.float32)
    assert all(not text.finite and text.tokens == () for text in broken.values())
