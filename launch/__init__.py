"""Gets a run onto machines."""
