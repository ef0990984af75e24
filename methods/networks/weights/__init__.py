"""Starting weights of encoders: files of other packages, recognised by their keys, and read without running code."""
