"""What the headers of safetensors files say, without torch or the safetensors library: `plan` starts without either."""

import json
from pathlib import Path
from typing import Literal


def stored_dtype(folder: Path) -> Literal["fp32", "bf16"] | None:
    """The element type of most of a model folder's first safetensors file (fp16 runs as bf16); None where none says.

    The loader goes by the files, not by config.json.
    """
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length < 2**27 else {}
            sizes: dict[str, int] = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # the loader will say what is wrong with it
        largest = max(sizes, key=lambda name: sizes[name], default="")
        return {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}.get(largest)
    return None
