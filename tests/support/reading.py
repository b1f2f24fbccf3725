"""Peak memory of reading a domain and sharing out its documents: python reading.py FOLDER

Prints JSON: documents; resident memory of the bare process and its peak, and what was read of files, in bytes; seconds.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pyarrow.compute
import pyarrow.parquet  # noqa: F401  (part of the bare process)

from copal.documents import read_documents, split_documents
from support.memory import memory


def bytes_read() -> int:
    found = re.search(r"^rchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def main(folder: Path) -> None:
    bare, before, began = memory("VmRSS"), bytes_read(), time.perf_counter()
    documents = read_documents(folder)
    split_documents(documents, 0.2)
    found = {"documents": len(documents), "bare": bare, "peak": memory("VmHWM"), "read": bytes_read() - before}
    print(json.dumps(found | {"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
