"""Numbers as files may give them: whole where they count, finite, and within what any machine has.

Takes nothing; gives annotated types for records.  A number in quotes, a truth value and 2.0 for 2 are refused, not
converted.  The limits are far beyond all that exists, so that no product of two of them overflows 63 bits or hangs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_BYTES = 2**60
"""An exbibyte: a million devices have less [Assumed]."""
MAX_DEVICES = 2**20
MAX_LAYERS = 2**14
MAX_SEQUENCES = 2**24

Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Devices = Annotated[int, Field(strict=True, ge=1, le=MAX_DEVICES)]
Layers = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
Sequences = Annotated[int, Field(strict=True, ge=1, le=MAX_SEQUENCES)]
"""Sequences of a step, or microbatches of one."""
MAX_TOKENS = 2**27
Tokens = Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)]
"""Tokens of a sequence."""
Bytes = Annotated[int, Field(strict=True, ge=0, le=MAX_BYTES)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(strict=True, gt=0, le=1e24, allow_inf_nan=False)]
"""FLOPs or bytes a second."""
Ratio = Annotated[float, Field(strict=True, ge=1, le=1e6, allow_inf_nan=False)]
"""How many times longer something takes."""
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
