"""The kinds of values in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slowness = Annotated[float, Field(ge=1, le=1e4, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
DtypeName = Literal["float32", "bfloat16", "int8"]
WireType = Literal["float32", "bfloat16", "int8"]
LoraTarget = Annotated[str, Field(pattern=r"^\w+$")]
LoraKind = Literal["lora", "rslora", "dora"]
PromptDepth = Literal["deep", "shallow"]
Backbone = Literal["frozen", "biases", "all"]
BlockRange = Annotated[str, Field(pattern=r"^\d+\.\.\d+$")]
