"""Networks of other libraries and of users' own files, as encoders."""
