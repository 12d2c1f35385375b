"""Pattern matching, the rewrite driver and the builder of new nodes."""
