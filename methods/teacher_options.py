"""What a recipe may say of a teacher. Without torch, so that a recipe is validated without it."""

from typing import Literal

TeacherPrecision = Literal["fp32", "bf16"]
