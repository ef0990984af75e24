"""What is drawn for a view, and from which ranges."""
