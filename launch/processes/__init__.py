"""The worker processes of one machine: started, supervised, ended."""
