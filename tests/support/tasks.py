"""A multiple-choice task in the dialect of `support.benches.text`, as files of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

from support.benches import text

TASK = """\
task: dialect
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, yaml: str = TASK, *, seed: int = 0, questions: int = 12) -> Path:
    """Put a task beside the documents in the domain's `folder`: how does a text of the dialect go on?"""
    place = folder / "tasks"
    place.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": text(seed, number)[:60],
            "choices": [text(seed, number)[60:80], text(seed + 1, number)[60:80]],
            "answer": 0,
        }
        for number in range(questions)
    ]
    (place / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "dialect.yaml").write_text(yaml)
    return place
