"""copal: prune one language model for a growing list of domains, without retraining.

Ten lines that prune the Hugging Face folder `base` for the texts in the folders `legal` and `medical`, one domain after
the other, and print how well the last version predicts texts of each that it was not calibrated on:

    from pathlib import Path
    import copal
    base, settings, parent, held_out = copal.open_base(Path("base")), copal.CalibrationConfig(), None, {}
    for number, name in enumerate(["legal", "medical"], start=2):
        text = copal.domain_windows(Path(name), base.tokenizer(), settings)
        domain = copal.NewDomain(name=name, md5=text.calibration_digest, windows=text.calibration)
        copal.prune_step(base, parent, domain, Path(f"v{number}"), calibration=settings, prune=copal.PruneConfig())
        parent, held_out[name] = copal.Parent.from_step(Path(f"v{number}"), number, parent), text.evaluation
    for name, score in copal.evaluate(parent.model, held_out).items():
        print(f"{name}: perplexity {score.perplexity:.2f}")

Half of the weights of the decoder blocks are then zero in `v2/model` and `v3/model`, which load with `from_pretrained`.
`v3` knows both domains: the step for `medical` reads `v2/state` and no text of `legal`. A domain's folder holds `.txt`,
`.jsonl` or `.parquet` files (`copal.documents.read_documents`); versions count from 2, for the base is the first.

The package is a library: it reads no command line and no environment, downloads nothing and configures no logging. Its
modules, each of which imports only from lines below its own:

    step                                            one step of continual pruning: start reading here
    estimate, memory, shapes                        what a step takes, before it runs: beside all of the following
    survey                                          where the loss decides: what is known of all blocks beforehand
    walk                                            what a step does to each block
    report, parent                                  what a step tells of itself, and what it builds on
    resume                                          what a step that was killed goes on from
    evaluation, generate                            perplexity of a version, and text that it writes
    baselines                                       what users know, to compare with
    solve                                           which weights go, and what becomes of those that stay
    state                                           the statistics of every domain on disk
    recorder                                        the statistics of one domain, taken while a block runs
    streaming                                       a model larger than memory, block by block
    allocation, fisher, labels                      what the loss minds, and so how many zeros each row gets
    sensitivity, packing, masks                     the formulas: statistics, their storage, scores to masks
    base                                            the dense model
    dry_load                                        whether a model folder can be used, before anything is made of it
    embeddings                                      for how many tokens and positions a model has rows
    calibration, tokenizer                          a domain's text as token windows
    checkpoint, architecture                        how models are stored and built
    experts, folder                                 their experts, and the files that they consist of
    leakage                                         text that calibrates one domain and evaluates another
    documents                                       which documents of a domain are read
    text_files, parquet_files, rows, domain_files   how files hold them, and which files are opened
    foreign                                         what others wrote, read within bounds
    meter, hardware, known                          what estimates are made from
    config, files, processes, progress              what all of them use
    out_of_memory                                   likewise: memory that runs out
    bounded, errors, printable                      likewise: JSON within bounds; text of others for a terminal
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from copal.base import Base, base_fingerprint, open_base
    from copal.baselines import magnitude, sparsegpt, wanda
    from copal.calibration import DomainWindows, domain_windows
    from copal.config import CalibrationConfig, PruneConfig
    from copal.errors import (
        CopalError,
        DataError,
        ModelError,
        NumericsError,
        ResourceError,
        SettingsError,
        SmallerBatchWarning,
        StateError,
    )
    from copal.evaluation import Score, backward_transfer, evaluate, geometric_mean
    from copal.parent import Parent
    from copal.progress import Progress
    from copal.report import LayerReport, StepReport, read_report
    from copal.sensitivity import Moment
    from copal.solve import Pruned, PruneGroup, prune_group
    from copal.state import DomainEntry, Manifest
    from copal.step import NewDomain, WithdrawnDomain, prune_step

    __version__: str

__all__ = [
    "Base",
    "CalibrationConfig",
    "CopalError",
    "DataError",
    "DomainEntry",
    "DomainWindows",
    "LayerReport",
    "Manifest",
    "ModelError",
    "Moment",
    "NewDomain",
    "NumericsError",
    "Parent",
    "Progress",
    "PruneConfig",
    "PruneGroup",
    "Pruned",
    "ResourceError",
    "Score",
    "SettingsError",
    "SmallerBatchWarning",
    "StateError",
    "StepReport",
    "WithdrawnDomain",
    "__version__",
    "backward_transfer",
    "base_fingerprint",
    "domain_windows",
    "evaluate",
    "geometric_mean",
    "magnitude",
    "open_base",
    "prune_group",
    "prune_step",
    "read_report",
    "sparsegpt",
    "wanda",
]

# Module -> what the imports above take from it; a type checker sees those, and nothing of what follows.
_NAMES = {
    "base": "Base base_fingerprint open_base",
    "baselines": "magnitude sparsegpt wanda",
    "calibration": "DomainWindows domain_windows",
    "config": "CalibrationConfig PruneConfig",
    "errors": "CopalError DataError ModelError NumericsError ResourceError SettingsError SmallerBatchWarning "
    "StateError",
    "evaluation": "Score backward_transfer evaluate geometric_mean",
    "parent": "Parent",
    "progress": "Progress",
    "report": "LayerReport StepReport read_report",
    "sensitivity": "Moment",
    "solve": "PruneGroup Pruned prune_group",
    "state": "DomainEntry Manifest",
    "step": "NewDomain WithdrawnDomain prune_step",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, imported on its first use (PEP 562): `import copal` alone takes no torch."""
        if name == "__version__":
            from importlib.metadata import version

            return version("copal")
        for module, names in _NAMES.items():
            if name in names.split():
                return getattr(import_module(f"copal.{module}"), name)
        raise AttributeError(f"module 'copal' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
