"""What all sections of a config have in common, and the part of capture that is about pictures."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PROMPTS = "prompts"  # the calibration data that needs no pictures


MOST = 10_000_000  # of anything that is counted: steps, states, pixels; more is a slip of the keyboard


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, numbers that can be meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any, field: ValidationInfo) -> Any:
        """Refuse early what would fail, or never end, after hours."""
        numbers = value if isinstance(value, list | tuple) else (value,)
        if field.field_name != "seed" and any(isinstance(number, int) and number > MOST for number in numbers):
            raise ValueError(f"expected at most {MOST:,}")
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that a stage's result depends on."""
        return self.model_dump()


class PicturesConfig(Section):
    """Captioned pictures as calibration data."""

    data: str = Field(
        PROMPTS,
        min_length=1,
        description="prompts: states of the teacher's own trajectories; or captioned pictures that are noised: a "
        "folder, shards like data-{000..012}.tar, *.parquet, hub:owner/name (docs/data.md); num_prompts counts them",
    )
    image_column: str = Field("image", description="of a Hugging Face data set")
    source_column: str = Field(
        "",
        description="of what starts from a picture (editing, image to video): the picture to start from, in a data "
        "set, a table, or a shard's NAME.<column>.png; the captioned picture itself if empty",
    )
    caption_column: str = Field(
        "text",
        description="of a data set, a table or a .json beside a picture; text: or caption, prompt ...",
    )
    data_split: str = Field("train", description="of a Hugging Face data set, or the folder of that name")
    aspect_ratios: tuple[str, ...] = Field(
        ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"),
        min_length=1,
        description="width:height that pictures are cut to, the nearest one, all of about the area of height x width",
    )

    @field_validator("aspect_ratios")
    @classmethod
    def _real_ratios(cls, ratios: tuple[str, ...]) -> tuple[str, ...]:
        """YAML 1.1 reads 4:3 without quotes as a number of seconds."""
        for text in ratios:
            if not re.fullmatch(r"[1-9]\d{0,2}:[1-9]\d{0,2}", text):
                raise ValueError(f"got {text!r}, expected width:height in quotes, e.g. ['1:1', '4:3']")
        return ratios

    def identity(self) -> dict[str, Any]:
        """Without what prompts alone do not read, and what is not given."""
        unread = set() if self.source_column else {"source_column"}
        return self.model_dump(exclude=set(PicturesConfig.model_fields) if self.data == PROMPTS else unread)
