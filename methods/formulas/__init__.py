"""What each method is held to, in the plainest code: see methods/verify.py."""
