"""Starts runs on machines: command line, recipes, jobs of a cluster, worker processes."""
