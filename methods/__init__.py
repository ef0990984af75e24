"""The protocol, what crosses ranks, and option types that all papers share."""
