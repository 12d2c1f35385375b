"""Do two modules compute the same? Both are run on the same feeds."""
