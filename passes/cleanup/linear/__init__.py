"""The rules of fold-linear, by idea."""
