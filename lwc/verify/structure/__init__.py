"""Is a module well formed, and did a pass keep what it must? Checked without running anything."""
