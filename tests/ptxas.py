"""What ptxas says about the Mosaic GPU kernels of an ahead-of-time compile."""

import dataclasses
import re
from pathlib import Path

import pytest


@dataclasses.dataclass
class Reports:
    """The reports of the kernels compiled since this was made, one file each."""

    folder: Path

    def spilled(self) -> list[int]:
        """Bytes that each kernel's threads store for want of registers."""
        texts = [path.read_text() for path in sorted(self.folder.glob("*ptxas*"))]
        found = [re.findall(r"(\d+) bytes spill stores, ", text) for text in texts]
        assert texts and all(found), "ptxas reported nothing"
        return [int(n) for some in found for n in some]


@pytest.fixture
def ptxas(tmp_path, monkeypatch) -> Reports:
    """Reports of the kernels that the test compiles. Too much shared memory is an error anyway."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    return Reports(tmp_path)
