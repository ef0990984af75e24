"""Files of other packages and of users' own, which recipes name: weights to start with, networks and methods."""
