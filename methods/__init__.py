"""Methods: their protocol, collectives with gradients, and option types that all papers share."""
