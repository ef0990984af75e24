"""What `kilobatch verify` holds each paper to."""
