"""Whether this release of transformers reads image processors without torchvision, which older ones want."""

from __future__ import annotations

import pytest
from transformers import AutoImageProcessor


def _reads_processors() -> bool:
    try:
        return AutoImageProcessor.from_pretrained is not None
    except ImportError:
        return False


OF_IMAGES = pytest.mark.skipif(not _reads_processors(), reason="this release of transformers needs torchvision for it")
