"""The model card of an exported version: README.md with the metadata that model hubs read. Pure: knows no registry."""

from __future__ import annotations

import re
from pathlib import Path

from flows.lineage.entries import GatesDetails
from flows.lineage.figures import four_digits, markdown_cell, markdown_table
from flows.lineage.record import Record, flatten

__all__ = ["CARD_FILE", "gates_verdict", "license_of", "model_card"]

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})")


def model_card(version: int, record: Record, license_name: str | None, gates: GatesDetails | None = None) -> str:
    """The text of a version's card.

    Args:
        license_name: of the base, None where nobody told.
        gates: their newest results; None where they never ran.
    """
    from huggingface_hub import ModelCard, ModelCardData

    hub = _HUB_ID.fullmatch(record.base.source)
    data = ModelCardData(
        base_model=hub[1] if hub else None,
        library_name="transformers",
        license=license_name,
        pipeline_tag="text-generation",
        tags=["copal", "pruned"] if record.domains else ["copal"],
    )
    title = f"# {markdown_cell(record.model)}, version {version}"
    parts = [title, *_warning(record, gates), _what(record), "## Use", _use(), "## Domains", _domains(record)]
    if record.parent is not None:
        parts += ["## Gates", _gates(gates)]
    parts += ["## Sparsity", _sparsity(record)]
    if record.parent is not None:
        parts += ["## Settings", _settings(record)]
    parts += ["## Lineage", _lineage(version, record)]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    return str(card)


def license_of(folder: Path) -> str | None:
    """The licence that the card in a model's folder names; None where it names none, or there is no card."""
    from huggingface_hub import ModelCard

    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        named = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except ValueError:  # somebody else's file, which need not be a card
        return None
    return named if isinstance(named, str) else None


def _what(record: Record) -> str:
    base = f"{_source(record)} (fingerprint `{record.base.fingerprint}`)"
    if record.parent is None:
        return f"The dense base model of a lineage of pruned models, from {base}. Nothing in it is pruned."
    names = ", ".join(markdown_cell(domain.name) for domain in record.domains) or "no domain"
    return (
        f"A causal language model, pruned without retraining by copal for {names}. The base is {base}: masks are "
        "decided from its dense weights, with the statistics of all domains, and the weights that stay are solved for."
    )


def gates_verdict(record: Record, gates: GatesDetails | None) -> str | None:
    """What somebody should know before a version serves: its gates failed, or never ran; None where all is well."""
    if record.parent is None or (gates is not None and gates.passed):
        return None
    if gates is None:
        return "its gates never ran: nobody has checked what it forgot"
    names = ", ".join(gate.name for gate in gates.failed)
    return f"{len(gates.failed)} of its {len(gates.gates)} gates failed: {names}"


def _warning(record: Record, gates: GatesDetails | None) -> list[str]:
    verdict = gates_verdict(record, gates)
    return [] if verdict is None else [f"> **Do not serve this version unseen: {markdown_cell(verdict)}.**"]


def _use() -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this one\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'tokens = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=20)[0]))\n"
        "```"
    )


def _gates(gates: GatesDetails | None) -> str:
    if gates is None:
        return "They never ran."
    rows = [
        (
            markdown_cell(gate.name),
            "passed" if gate.passed else "**failed**",
            four_digits(gate.value),
            four_digits(gate.limit),
            markdown_cell(gate.detail),
        )
        for gate in gates.gates
    ]
    return markdown_table(("gate", "", "value", "limit", "what it looked at"), rows)


def _settings(record: Record) -> str:
    """What of the settings has made the weights what they are."""
    rows = [
        (f"`{name}`", f"`{markdown_cell(str(value))}`")
        for section in ("prune", "calibration")
        for name, value in flatten({section: record.settings.get(section, {})})
    ]
    return markdown_table(("setting", "value"), rows)


def _source(record: Record) -> str:
    source = record.base.source
    return (
        "a local folder" if Path(source).is_absolute() else f"`{markdown_cell(source)}`"
    )  # a path is nobody else's business


def _domains(record: Record) -> str:
    if not record.domains:
        return "None: no data but that of the base has gone into this version."
    rows = [
        (
            markdown_cell(domain.name),
            f"{record.perplexity[domain.name]:.2f}",
            f"{record.dense_perplexity[domain.name]:.2f}",
            f"{domain.evaluation_tokens:,}",
            f"{domain.tokens:,}",
            f"`{markdown_cell(domain.dvc_md5)}`",
            f"`{markdown_cell(domain.git_rev)}`",
        )
        for domain in record.domains
    ]
    heads = ("domain", "perplexity", "dense", "predicted tokens", "calibration tokens", "DVC md5", "git revision")
    return (
        f"{markdown_table(heads, rows)}\n\n"
        "Perplexity is exp(nats / predicted tokens) on windows of the domain's documents that no calibration saw; "
        "*dense* is the base model on the same windows."
    )


def _sparsity(record: Record) -> str:
    target, counted = record.sparsity.target, record.sparsity.counted
    if record.parent is None:
        return "The model is dense."
    said = [
        f"Of the weights of the decoder's linear layers {counted:.2%} are zero, as counted (embeddings and head are "
        "not pruned). This is an ordinary dense safetensors checkpoint with zeros in it: it loads with "
        "`AutoModelForCausalLM.from_pretrained`, and **it is neither smaller on disk nor faster** by itself."
    ]
    if not isinstance(target, str):
        said.append(
            "Unstructured zeros only help where a runtime has kernels for them; the common GPU servers have none."
        )
    else:
        said.append(f"The zeros have the pattern {target}: so many of the neighbours in a row stay.")
        if target == "2:4":
            said.append(
                "`torch.sparse.to_sparse_semi_structured` takes such weights on NVIDIA GPUs of compute capability 8.0 "
                "and newer."
            )
    return " ".join(said)


def _lineage(version: int, record: Record) -> str:
    parent = record.parent
    rows = [
        ("version", str(version)),
        ("SHA-256 of its record", f"`{record.digest}`"),
        ("parent", "none" if parent is None else f"version {parent.version}, record `{parent.digest}`"),
        ("made", f"{record.created} by copal {record.code.version}"),
    ]
    return (
        f"{markdown_table(('', ''), rows)}\n\n"
        f"`copal verify {version}` in the workspace of {markdown_cell(record.model)} checks files, records, log, data "
        "and signature."
    )
