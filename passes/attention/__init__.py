"""Passes that fuse attention and change what it keeps and sees."""
