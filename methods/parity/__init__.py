"""Reference formulas, with which `kilobatch verify` compares each paper."""
