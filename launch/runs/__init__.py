"""Run folders and what is known of them; no torch."""
