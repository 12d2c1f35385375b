"""The rules of canonicalize, by idea."""
