"""How large the sensitivity state of a model is, told from its configuration: no weight is read or made.

The model's forward runs on fake tensors, which have shapes only, so that linears with a common input are found as a
step finds them; the bytes are those of the tensors that a step would write. The float32 sum is not counted: only the
newest version needs one, and contributions give it again.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from copal.architecture import Architecture
from copal.compact import block_bytes
from copal.sensitivity import Moment, record_moments
from copal.state import contribution_tensors

__all__ = ["contribution_bytes", "model_bytes"]


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model in a 16-bit dtype; tied parameters count once."""
    return 2 * int(model.num_parameters())


def contribution_bytes(model: PreTrainedModel, storage: str) -> int:
    """Bytes of one domain's contribution for the criterion `output`, without the headers of its files.

    Args:
        model: from `copal.architecture.load_skeleton`; moved to the meta device.
        storage: `full` or `compact`.

    Raises:
        ModelError: no stack of decoder blocks is there.
    """
    model.to("meta")
    blocks = [model.get_submodule(name) for name in Architecture.of(model).blocks]
    compact = block_bytes(int(model.num_parameters()), len(blocks)) if storage == "compact" else None
    total = 0
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        with ExitStack() as stack:
            recorders = [stack.enter_context(record_moments(block, gradient=False)) for block in blocks]
            model(torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
        for recorder in recorders:
            shapes = recorder.shapes()
            moments = {group: Moment(torch.empty(inputs, inputs), 1.0) for group, (_, inputs) in shapes.items()}
            tensors = contribution_tensors(moments, shapes, compact)
            total += sum(tensor.nbytes for tensor in tensors.values())
    return total
