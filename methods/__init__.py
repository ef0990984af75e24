"""The papers: one file each, and the few pieces they share."""
