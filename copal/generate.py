"""Text that a checkpoint writes by itself: a look at whether it is a language model at all.

Shapes: D prompts, P tokens of a prompt, T tokens that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from copal.architecture import load_config
from copal.embeddings import longest_window
from copal.errors import ModelError, ResourceError, one_line

__all__ = ["Continuation", "continue_greedily"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        tokens: most likely next tokens, one after another; they end where logits are not finite.
        finite: whether all logits were.
    """

    tokens: tuple[int, ...]
    finite: bool

    @property
    def degenerate(self) -> bool:
        """Whether it is one token over and over, or nothing."""
        return len(set(self.tokens)) < 2


@torch.no_grad()
def continue_greedily(
    folder: Path, prompts: Mapping[str, Tensor], *, tokens: int = 20, dtype: torch.dtype
) -> dict[str, Continuation]:
    """The most likely continuation of each prompt, all prompts at once.

    The model is loaded whole, once: on the GPUs, then in memory, and what fits in neither stays on the disk and is read
    for each token (accelerate's device map), so that a model larger than memory is slow here and nothing worse. There
    is no cache of keys and values: prompts and continuations are short, and not every architecture has one. A model
    with learned positions sees the last tokens for which it has some.

    Args:
        folder: a Hugging Face folder with safetensors weights.
        prompts: name -> (P,) tokens, all of one length.
        tokens: T.

    Raises:
        ModelError: `folder` cannot be read as a causal language model.
        ResourceError: memory is not enough.
    """
    from transformers import AutoModelForCausalLM

    written = torch.stack(list(prompts.values()))
    start = written.shape[1]
    finite = torch.ones(len(written), dtype=torch.bool)
    with TemporaryDirectory(prefix="copal-") as offload, _no_progress_bar():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=load_config(folder),
                dtype=dtype,
                device_map="auto",
                offload_folder=offload,
                local_files_only=True,
                trust_remote_code=False,
            )
            first = torch.device("cpu") if model.device.type == "meta" else model.device  # meta: its place is the disk
            most = longest_window(model) or start + tokens
            ends = torch.full((len(written),), start + tokens)
            for place in range(start, start + tokens):
                logits = model(written[:, -most:].to(first), use_cache=False).logits[:, -1].float().cpu()
                fine = logits.isfinite().all(dim=1)
                ends[finite & ~fine] = place
                finite &= fine
                written = torch.cat([written, logits.nan_to_num().argmax(dim=1, keepdim=True)], dim=1)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded by transformers: {one_line(error)}") from error
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise ResourceError(
                f"memory is not enough to let {folder} write text: set gates.generation to false"
            ) from error
    return {
        name: Continuation(tuple(row[start:end].tolist()), bool(fine))
        for name, row, end, fine in zip(prompts, written, ends.tolist(), finite, strict=True)
    }


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for the weights that it loads."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
