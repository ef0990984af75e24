"""What `kilobatch bench` measures."""
