"""Operations on one tile of a similarity matrix."""
