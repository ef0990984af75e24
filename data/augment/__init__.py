"""What is done to a view once it is cut out."""
